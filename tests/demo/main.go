// Command demo tells the whole story on one machine, every part real: two
// images are built, described, signed, one of them encrypted, and published; a
// signed policy names them; the agent measures, attests, verifies, decrypts,
// compares and runs them; it is upgraded, rolled back, refused three times and
// destroyed. See README.md for its environment and its output.
//
// What it asserts it sees from outside: in the broker's audit log, in podman,
// over HTTP, in the registry; the agent's own word is shown, never trusted
// alone.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/cc-runtime/cvm-agent/tests/rig"
)

func main() {
	// The first signal ends the story and cleans up; a second one while that
	// is under way is ignored, so that nothing is left behind.
	ctx, stop := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		stop(fmt.Errorf("stopped by %s", <-signals))
	}()
	os.Exit(run(ctx, os.Stdout))
}

// run returns the exit status.
func run(ctx context.Context, out io.Writer) int {
	show := newDisplay(out)
	began := time.Now()
	if os.Geteuid() != 0 {
		show.failed("preparation", errors.New("run as root: the demo mounts file systems and runs containers"))
		return 1
	}
	r, err := rig.New(rig.Options{Dir: os.Getenv("CVM_DEMO_WORK"), Bin: os.Getenv("CVM_DEMO_BIN"), Out: show.detail()})
	if err != nil {
		show.failed("preparation", err)
		return 1
	}
	s := &story{show: show, rig: r}
	step, err := s.tell(ctx)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if cleanup := r.Close(); cleanup != nil && err == nil {
		step, err = "cleanup", cleanup
	}
	s.following.Wait()
	if err != nil {
		show.failed(step, err)
		return 1
	}
	show.ok(time.Since(began))
	return 0
}
