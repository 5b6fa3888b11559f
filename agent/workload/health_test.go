package workload

import (
	"context"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// What a workload answers to a probe goes into texts that the host reads; no
// byte that it chose may.
func TestProbeHTTPKeepsTheAnswerIn(t *testing.T) {
	for name, tc := range map[string]struct{ answer, want string }{
		"a phrase of its own":        {"HTTP/1.1 500 password hunter2\r\nContent-Length: 0\r\n\r\n", "answered 500"},
		"no HTTP":                    {"password hunter2\r\n\r\n", "no answer in HTTP"},
		"a status that is no number": {"HTTP/1.1 hunter2 x\r\n\r\n", "no answer in HTTP"},
		"a header that is none":      {"HTTP/1.1 200 OK\r\nhunter2\r\n\r\n", "no answer in HTTP"},
		"a length that is none":      {"HTTP/1.1 200 OK\r\nContent-Length: hunter2\r\n\r\n", "no answer in HTTP"},
		"a coding that is none":      {"HTTP/1.1 200 OK\r\nTransfer-Encoding: hunter2\r\n\r\n", "no answer in HTTP"},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				c, err := l.Accept()
				if err != nil {
					return
				}
				defer c.Close()
				_, _ = c.Read(make([]byte, 4096))
				_, _ = io.WriteString(c, tc.answer)
			}()
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			err = probeHTTP(ctx, l.Addr().String(), "/health")
			if err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%v, expected %q and nothing of the answer", err, tc.want)
			}
		})
	}
}

func TestLogOfIsBesideTheText(t *testing.T) {
	err := cause.New(cause.WorkloadUnhealthy, "%s %w", "web", &Ended{7, "password hunter2"})
	if got := err.Error(); got != "workload-unhealthy: web exited with status 7" {
		t.Errorf("%q", got)
	}
	if got := LogOf(err); got != "password hunter2" {
		t.Errorf("log %q", got)
	}
	if got := LogOf(cause.New(cause.WorkloadUnhealthy, "x")); got != "" {
		t.Errorf("log %q of an error without one", got)
	}
}
