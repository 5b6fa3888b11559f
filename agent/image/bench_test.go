package image

import (
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkFetch compares ways into podman's storage on one image with one
// layer of about 450 MB, made from this machine's programs. All start from
// empty storage; each gets the image from the stock registry on the loopback
// interface.
func BenchmarkFetch(b *testing.B) {
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = os.RemoveAll(dir) })
	if out, err := exec.Command("tar", "-C", "/", "-cf", dir+"/layer.tar", "usr/bin", "usr/sbin", "usr/lib/gcc").CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	raw, err := os.ReadFile(dir + "/layer.tar")
	if err != nil {
		b.Fatal(err)
	}
	reg := startRegistry(b)
	open := push(b, reg+"/plain", false, raw)
	sealed := push(b, reg+"/sealed", true, raw)
	size := int64(len(raw))
	n := 0
	fresh := func(b *testing.B) string {
		n++
		d := fmt.Sprintf("%s/%d", dir, n)
		if err := os.Mkdir(d, 0o700); err != nil {
			b.Fatal(err)
		}
		return d
	}
	for name, p := range map[string]*published{"agent, plain": open, "agent, encrypted": sealed} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				c := client(b, fresh(b), plain(reg))
				start, cpu := time.Now(), cpuSeconds()
				if _, err := fetch1(c, b, p); err != nil {
					b.Fatal(err)
				}
				first := time.Since(start)
				b.ReportMetric(cpuSeconds()-cpu, "cpu-s")
				start = time.Now()
				if _, err := fetch1(c, b, p); err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(first.Seconds(), "first-s")
				b.ReportMetric(time.Since(start).Seconds(), "cached-s")
			}
		})
	}
	for name, args := range map[string]func(d string) []string{
		"podman pull": func(d string) []string {
			return []string{"podman", "--root", d + "/g", "--runroot", d + "/r", "--storage-driver", "overlay", "pull", "-q", "--tls-verify=false", open.ref}
		},
		"skopeo copy": func(d string) []string {
			return []string{"skopeo", "copy", "-q", "--src-tls-verify=false", "docker://" + open.ref, "containers-storage:[overlay@" + d + "/g+" + d + "/r]bench:x"}
		},
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				a, cpu := args(fresh(b)), cpuSeconds()
				if out, err := exec.Command(a[0], a[1:]...).CombinedOutput(); err != nil {
					b.Fatalf("%v: %s", err, out)
				}
				b.ReportMetric(cpuSeconds()-cpu, "cpu-s")
			}
		})
	}
}

// cpuSeconds is what this process and the children that it has waited for have
// used: on a busy machine a better measure than the wall clock.
func cpuSeconds() float64 {
	n := 0.0
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var ru unix.Rusage
		if unix.Getrusage(who, &ru) == nil {
			n += time.Duration(ru.Utime.Nano() + ru.Stime.Nano()).Seconds()
		}
	}
	return n
}
