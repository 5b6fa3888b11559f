// Command guest is the only program of the test images: a workload that says
// what it can see.
package main

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

func main() {
	switch os.Args[1] {
	case "serve": // serve ADDR
		http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "hello") })
		http.HandleFunc("/secret", func(w http.ResponseWriter, r *http.Request) {
			b, err := os.ReadFile("/run/secrets/" + r.URL.Query().Get("name"))
			fmt.Fprintf(w, "%s %v", b, err)
		})
		http.HandleFunc("/write", func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, os.WriteFile(r.URL.Query().Get("path"), []byte("x"), 0o600))
		})
		http.HandleFunc("/status", func(w http.ResponseWriter, _ *http.Request) {
			b, _ := os.ReadFile("/proc/self/status")
			w.Write(b)
		})
		http.HandleFunc("/mounts", func(w http.ResponseWriter, _ *http.Request) {
			b, _ := os.ReadFile("/proc/self/mounts")
			w.Write(b)
		})
		http.HandleFunc("/env", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, strings.Join(os.Environ(), "\n")) })
		http.HandleFunc("/fences", fences)
		http.HandleFunc("/broken", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) })
		fmt.Println(http.ListenAndServe(os.Args[2], nil))
	case "die": // die TEXT
		fmt.Println(os.Args[2])
		os.Exit(7)
	case "check": // check CODE
		var code int
		fmt.Sscan(os.Args[2], &code)
		os.Exit(code)
	case "sleep":
		time.Sleep(time.Hour)
	}
}

// fences tries what leads out of a container, and what a workload needs.
func fences(w http.ResponseWriter, _ *http.Request) {
	for _, s := range []struct {
		name                   string
		family, kind, protocol int
	}{
		{"unix", syscall.AF_UNIX, syscall.SOCK_STREAM, 0},
		{"inet", syscall.AF_INET, syscall.SOCK_DGRAM, 0},
		{"inet6", syscall.AF_INET6, syscall.SOCK_STREAM, 0},
		{"netlink", syscall.AF_NETLINK, syscall.SOCK_RAW, 0},
		{"audit", syscall.AF_NETLINK, syscall.SOCK_RAW, 9},
		{"vsock", 40, syscall.SOCK_STREAM, 0},
		{"alg", 38, syscall.SOCK_SEQPACKET, 0},
	} {
		fd, err := syscall.Socket(s.family, s.kind, s.protocol)
		say(w, "socket "+s.name, err)
		_ = syscall.Close(fd)
	}
	say(w, "unshare user", syscall.Unshare(syscall.CLONE_NEWUSER))
	say(w, "fork", exec.Command("/guest", "check", "0").Run())
	inside := exec.Command("/guest", "check", "0")
	inside.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER}
	say(w, "clone user", inside.Run())
	for name, call := range map[string]uintptr{"clone3": 435, "setns": 308, "mount": syscall.SYS_MOUNT, "fsopen": 430, "io_uring_setup": 425} {
		_, _, errno := syscall.Syscall6(call, 0, 0, 0, 0, 0, 0)
		say(w, name, errno)
	}
}

func say(w http.ResponseWriter, what string, err error) {
	var errno syscall.Errno
	text := "ok"
	if errors.As(err, &errno) && errno != 0 {
		text = fmt.Sprintf("errno %d", int(errno))
	} else if err != nil && errno == 0 && !errors.As(err, &errno) {
		text = err.Error()
	}
	fmt.Fprintf(w, "%s: %s\n", what, text)
}
