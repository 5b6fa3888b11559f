package rig

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Process is a part that runs until stopped. It leads a process group of its
// own, so that a Ctrl-C on the terminal reaches the rig alone, which then stops
// the parts in order.
type Process struct {
	Name string
	Log  string // file with its standard output and error

	cmd  *exec.Cmd
	done chan struct{}
	stop sync.Once
}

// Start runs argv in the background with env added to the environment, its
// output going to log/NAME.log. Close stops it.
func (r *Rig) Start(name string, env []string, argv ...string) (*Process, error) {
	return r.start(name, env, nil, argv...)
}

// start also copies standard output and error to tee, when it is not nil.
func (r *Rig) start(name string, env []string, tee io.Writer, argv ...string) (*Process, error) {
	if _, err := os.Stat(argv[0]); strings.Contains(argv[0], "/") && err != nil {
		return nil, fmt.Errorf("%s: %w (run `make deps build`)", name, err)
	}
	p := &Process{Name: name, Log: r.Path("log", name+".log"), done: make(chan struct{})}
	log, err := os.OpenFile(p.Log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	p.cmd = exec.Command(argv[0], argv[1:]...)
	p.cmd.Dir = r.Dir
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if tee != nil {
		p.cmd.Stderr = io.MultiWriter(log, tee)
		p.cmd.Stdout = p.cmd.Stderr
	}
	p.cmd.WaitDelay = time.Second
	// A rig that is killed outright takes its parts along.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		log.Close()
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	go func() {
		_ = p.cmd.Wait() // its outcome is in ProcessState
		log.Close()
		close(p.done)
	}()
	r.say("%s: started, pid %d", name, p.PID())
	r.OnClose(func() error {
		p.Stop()
		return nil
	})
	return p, nil
}

// PID is the process's id, which is also its group's.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Running says whether the process has not ended.
func (p *Process) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Signal sends a signal to the process alone, not to its group.
func (p *Process) Signal(s syscall.Signal) error { return p.cmd.Process.Signal(s) }

// Kill ends the whole group at once and waits for it.
func (p *Process) Kill() {
	_ = syscall.Kill(-p.PID(), syscall.SIGKILL) // it may have ended
	<-p.done
}

// Stop asks the process to end, ends its group after ten seconds, and waits.
func (p *Process) Stop() {
	p.stop.Do(func() {
		if p.Running() {
			_ = p.cmd.Process.Signal(syscall.SIGTERM)
			select {
			case <-p.done:
			case <-time.After(10 * time.Second):
			}
		}
		_ = syscall.Kill(-p.PID(), syscall.SIGKILL) // children that outlived it
		<-p.done
	})
}

// Wait waits for the end and returns the exit status; a signal counts as 128
// plus its number, as in a shell.
func (p *Process) Wait(ctx context.Context) (int, error) {
	select {
	case <-ctx.Done():
		return 0, fmt.Errorf("waiting for %s: %w", p.Name, ctx.Err())
	case <-p.done:
		return exitStatus(p.cmd.ProcessState), nil
	}
}

// Output is what the process has written so far.
func (p *Process) Output() string {
	data, err := os.ReadFile(p.Log)
	if err != nil {
		return err.Error()
	}
	return string(data)
}

// ready waits until check succeeds, or the process ends first.
func (p *Process) ready(ctx context.Context, within time.Duration, check func() error) error {
	var ended error
	err := Eventually(ctx, within, func() error {
		if !p.Running() {
			ended = fmt.Errorf("%s ended: %s: %s", p.Name, p.cmd.ProcessState, tail(p.Output(), 5))
			return nil
		}
		return check()
	})
	if ended != nil {
		return ended
	}
	if err != nil {
		return fmt.Errorf("%s is not ready: %w: %s", p.Name, err, tail(p.Output(), 5))
	}
	return nil
}

// CommandError is a command that ended with a status other than zero.
type CommandError struct {
	Argv   []string
	Status int
	Stdout string
	Stderr string
}

func (e *CommandError) Error() string {
	return fmt.Sprintf("%s: exit status %d: %s", filepath.Base(e.Argv[0])+" "+strings.Join(e.Argv[1:min(len(e.Argv), 3)], " "), e.Status, tail(e.Stderr, 4))
}

// ExitStatus is the exit status that err stands for: 0 for nil, -1 when err is
// no CommandError.
func ExitStatus(err error) int {
	var e *CommandError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &e):
		return e.Status
	default:
		return -1
	}
}

// Run runs argv to its end, in the work directory, and returns its standard
// output. A status other than zero is a *CommandError.
func (r *Rig) Run(ctx context.Context, env []string, argv ...string) (string, error) {
	return r.RunInput(ctx, nil, env, argv...)
}

// RunInput is Run with a standard input.
func (r *Rig) RunInput(ctx context.Context, stdin io.Reader, env []string, argv ...string) (string, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = r.Dir
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdin = stdin
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	err := cmd.Run()
	if ctx.Err() != nil {
		return stdout.String(), fmt.Errorf("%s: %w", filepath.Base(argv[0]), context.Cause(ctx))
	}
	if cmd.ProcessState != nil && !cmd.ProcessState.Success() {
		return stdout.String(), &CommandError{Argv: argv, Status: exitStatus(cmd.ProcessState), Stdout: stdout.String(), Stderr: stderr.String()}
	}
	return stdout.String(), err
}

func exitStatus(s *os.ProcessState) int {
	if ws, ok := s.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return s.ExitCode()
}

// tail is the last n non-empty lines of s, joined by " | ".
func tail(s string, n int) string {
	var lines []string
	for line := range strings.Lines(s) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-n):], " | ")
}
