package fault

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// watchCommands look for keys where others can see them.
var watchCommands = map[string]command{
	"watch":  {"", 0, startWatch},
	"unseen": {"", 0, unseen},
}

// watch reads every process's arguments and environment again and again.
type watch struct {
	forms  map[string][][]byte // the forms in which a value leaks, by its name
	cancel context.CancelFunc
	seen   chan map[string]bool
	rounds int
}

func startWatch(_ context.Context, w *world, _ *testscript.TestScript, _ []string) error {
	o := &watch{forms: map[string][][]byte{"the image's key": leaks(w.kek), "the secret": leaks([]byte(token))}, seen: make(chan map[string]bool, 1)}
	ctx, cancel := context.WithCancel(context.Background())
	o.cancel, w.watch = cancel, o
	go func() {
		found := map[string]bool{}
		for ; ctx.Err() == nil; time.Sleep(5 * time.Millisecond) {
			o.rounds++
			for _, pattern := range []string{"/proc/[0-9]*/cmdline", "/proc/[0-9]*/environ"} {
				files, _ := filepath.Glob(pattern) // the pattern is good
				for _, file := range files {
					if data, err := os.ReadFile(file); err == nil { // it may have ended
						if name := o.find(data); name != "" {
							found[name+" in "+file] = true
						}
					}
				}
			}
		}
		o.seen <- found
	}()
	return nil
}

func leaks(value []byte) [][]byte {
	return [][]byte{value, []byte(hex.EncodeToString(value)), []byte(strings.ToUpper(hex.EncodeToString(value))),
		[]byte(base64.RawStdEncoding.EncodeToString(value)), []byte(base64.RawURLEncoding.EncodeToString(value))}
}

func (o *watch) find(data []byte) string {
	for name, forms := range o.forms {
		for _, form := range forms {
			if bytes.Contains(data, form) {
				return name
			}
		}
	}
	return ""
}

// unseen ends the watch, and looks through the agent's output and through all
// files that it and podman have: the secret may be in one place alone, the file
// that its workload reads, on the tmpfs for secrets; and nobody but root may
// read any of the agent's files.
func unseen(_ context.Context, w *world, _ *testscript.TestScript, _ []string) error {
	o := w.watch
	o.cancel()
	var errs []error
	for where := range <-o.seen {
		errs = append(errs, errors.New(where))
	}
	if o.rounds < 5 {
		errs = append(errs, fmt.Errorf("the processes were looked at %d times only", o.rounds))
	}
	if name := o.find([]byte(w.agent.stderr.String() + w.agent.stdout.String())); name != "" {
		errs = append(errs, errors.New(name+" in the agent's output"))
	}
	secrets, delivered := filepath.Join(w.guest.RunDir, "secrets"), 0
	for _, root := range []string{w.guest.RunDir, w.guest.StateDir, w.podman.GraphRoot, w.podman.RunRoot, filepath.Join(w.podman.Dir, "tmp")} {
		errs = append(errs, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return nil // files of podman's come and go
			}
			info, err := d.Info()
			if err != nil {
				return nil
			}
			agents, mode := root == w.guest.RunDir || root == w.guest.StateDir, info.Mode().Perm()
			below := strings.HasPrefix(path, secrets+"/") // nobody enters secrets
			if agents && !below && mode&0o077 != 0 {
				errs = append(errs, fmt.Errorf("%s has mode %o", path, mode))
			}
			if !d.Type().IsRegular() || info.Size() > 8<<20 {
				return nil
			}
			data, err := os.ReadFile(path)
			if err != nil {
				return nil
			}
			switch name := o.find(data); {
			case name == "":
			case below && name == "the secret" && mode == 0o400:
				delivered++
			default:
				errs = append(errs, fmt.Errorf("%s in %s, mode %o", name, path, mode))
			}
			return nil
		}))
	}
	if delivered != 1 {
		errs = append(errs, fmt.Errorf("the secret is in %d files of the workload's, expected one", delivered))
	}
	return errors.Join(errs...)
}
