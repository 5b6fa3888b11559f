package sbom

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// The test binary is also the program in the sandbox: static, like cvm-sbom,
// and as hostile as its second argument says.
func TestMain(m *testing.M) {
	Reexec()
	if len(os.Args) == 3 && os.Args[0] == "cvm-sbom" && os.Args[1] == "hostile" {
		stdin, err := io.ReadAll(os.Stdin)
		if os.Args[2] == "stdin" && err == nil && len(stdin) == 0 {
			fmt.Print("denied")
		}
		hostile(os.Args[2])
		os.Exit(0)
	}
	code := m.Run()
	removeProgram()
	os.Exit(code)
}

// hostile tries one thing and prints "denied" or what it got.
func hostile(what string) {
	try := func(err error) {
		if err == nil {
			fmt.Print("allowed")
			return
		}
		fmt.Print("denied")
	}
	switch what {
	case "tcp":
		_, err := net.DialTimeout("tcp", "127.0.0.1:22", time.Second)
		if !errors.Is(err, syscall.EPERM) {
			err = nil
		}
		try(err)
	case "unix socket":
		_, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		try(err)
	case "vsock":
		_, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0)
		try(err)
	case "write to the root":
		try(os.WriteFile(sandboxRoot+"/new", nil, 0o600))
	case "write beside the root":
		try(os.WriteFile("/new", nil, 0o600))
	case "change the program":
		_, err := os.OpenFile(sandboxProgram, os.O_WRONLY, 0)
		try(err)
	case "ptrace":
		try(unix.PtraceAttach(1))
	case "process":
		try(exec.Command(sandboxProgram, "hostile", "tcp").Run())
	case "fork bomb":
		_, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
		if errno == 0 {
			try(nil)
			return
		}
		try(errno)
	case "mount":
		try(unix.Mount("", "/tmp", "", unix.MS_REMOUNT, ""))
	case "unshare":
		try(unix.Unshare(unix.CLONE_NEWUSER))
	case "kill":
		try(unix.Kill(-1, 0))
	case "file by handle":
		_, _, err := unix.NameToHandleAt(unix.AT_FDCWD, sandboxRoot, 0)
		try(err)
	case "memfd":
		_, err := unix.MemfdCreate("x", 0)
		try(err)
	case "proc":
		_, err := os.ReadDir("/proc")
		try(err)
	case "raise a limit":
		try(unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 4096, Max: 4096}))
	case "become root":
		try(unix.Setuid(0))
	case "below":
		_, err := os.Stat(sandboxRoot + "/below/file")
		try(err)
	case "chmod":
		try(os.Chmod(sandboxRoot+"/secret", 0o777))
	case "other device":
		_, err := os.Open(sandboxRoot + "/null")
		try(err)
	case "big file in tmp":
		f, err := os.Create("/tmp/x")
		if err == nil {
			buf := make([]byte, 1<<20)
			for i := 0; i < 64 && err == nil; i++ {
				_, err = f.Write(buf)
			}
		}
		try(err)
	case "environment":
		if len(os.Environ()) > 0 {
			try(nil)
			return
		}
		try(os.ErrNotExist)
	case "read the secret":
		b, err := os.ReadFile(sandboxRoot + "/secret")
		fmt.Print(string(b), err)
	case "memory hog":
		var all [][]byte
		for range 4096 {
			b := make([]byte, 1<<20)
			for i := range b {
				b[i] = 1
			}
			all = append(all, b)
		}
		fmt.Print(len(all))
	case "endless output":
		for {
			if _, err := os.Stdout.Write(make([]byte, 4096)); err != nil {
				os.Exit(1)
			}
		}
	case "sleep":
		time.Sleep(time.Hour)
	case "crash":
		fmt.Fprint(os.Stderr, "\x1b[31mpanic\nsecond line\x00", strings.Repeat("x", 1<<20))
		os.Exit(7)
	}
}

func testSandbox(t *testing.T) (*Sandbox, string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("the sandbox needs root: run the tests as root")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "secret"), []byte("for root alone"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mknod(filepath.Join(root, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(root, 0o700); err != nil {
		t.Fatal(err)
	}
	s := &Sandbox{Program: self, MemoryMax: 256 << 20, Timeout: 30 * time.Second, TempMax: 16 << 20, MaxOutput: 1 << 20}
	return s.withDefaults(), root
}

// run runs a program, args, in the sandbox.
func run(s *Sandbox, ctx context.Context, root string, args []string) ([]byte, error) { //nolint:revive // as a method would
	p, err := s.start(ctx, args)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	var out bytes.Buffer
	err = p.Scan(ctx, root, nil, &out)
	return out.Bytes(), err
}

func TestEachHostileAttemptIsDenied(t *testing.T) {
	s, root := testSandbox(t)
	for _, what := range []string{
		"tcp", "unix socket", "vsock", "write to the root", "write beside the root", "change the program", "ptrace", "process",
		"fork bomb", "mount", "unshare", "kill", "file by handle", "memfd", "proc", "raise a limit", "become root", "chmod",
		"other device", "big file in tmp", "environment", "stdin",
	} {
		t.Run(what, func(t *testing.T) {
			out, err := run(s, context.Background(), root, []string{"cvm-sbom", "hostile", what})
			if err != nil || string(out) != "denied" {
				t.Fatalf("got %q, %v", out, err)
			}
		})
	}
}

func TestFilesOfTheImagesRootAreRead(t *testing.T) {
	s, root := testSandbox(t)
	out, err := run(s, context.Background(), root, []string{"cvm-sbom", "hostile", "read the secret"})
	if err != nil || !strings.HasPrefix(string(out), "for root alone") {
		t.Fatalf("got %q, %v", out, err)
	}
}

func TestLesson22_EachLimitHasItsOwnWord(t *testing.T) {
	for name, c := range map[string]struct {
		what  string
		tune  func(*Sandbox)
		words string
	}{
		"memory, control group":  {"memory hog", func(*Sandbox) {}, "bytes of memory"},
		"memory, resource limit": {"memory hog", func(s *Sandbox) { s.noCgroup = true }, "bytes of memory"},
		"endless output":         {"endless output", func(*Sandbox) {}, "wrote more than"},
		"time":                   {"sleep", func(s *Sandbox) { s.Timeout = time.Second }, "took longer than"},
	} {
		t.Run(name, func(t *testing.T) {
			s, root := testSandbox(t)
			c.tune(s)
			start := time.Now()
			_, err := run(s, context.Background(), root, []string{"cvm-sbom", "hostile", c.what})
			if cause.Of(err) != cause.SBOMScanLimits || !strings.Contains(err.Error(), c.words) {
				t.Fatalf("got %v, want %s with %q", err, cause.SBOMScanLimits, c.words)
			}
			if d := time.Since(start); d > 20*time.Second {
				t.Errorf("took %v", d)
			}
		})
	}
}

func TestACrashIsQuotedInOneBoundedLine(t *testing.T) {
	s, root := testSandbox(t)
	_, err := run(s, context.Background(), root, []string{"cvm-sbom", "hostile", "crash"})
	if cause.Of(err) != cause.SBOMScanFailed {
		t.Fatalf("got %v", err)
	}
	if text := err.Error(); len(text) > 300 || strings.ContainsAny(text, "\n\x1b\x00") || !strings.Contains(text, "panic | second line") {
		t.Errorf("unfit for a person: %q", text)
	}
}

func TestASandboxThatCannotBeSetUpRunsNothing(t *testing.T) {
	for name, c := range map[string]struct {
		tune    func(*testing.T, *Sandbox, *string)
		measure string
	}{
		"program that others can write": {func(t *testing.T, s *Sandbox, _ *string) {
			p := filepath.Join(t.TempDir(), "p")
			if err := errors.Join(os.WriteFile(p, nil, 0o777), os.Chmod(p, 0o777)); err != nil {
				t.Fatal(err)
			}
			s.Program = p
		}, `"program"`},
		"program that is not there": {func(_ *testing.T, s *Sandbox, _ *string) { s.Program = "/nonexistent" }, `"program"`},
		"root that is not there":    {func(_ *testing.T, _ *Sandbox, root *string) { *root = "/nonexistent" }, `"read-only image"`},
		"no place to mount":         {func(_ *testing.T, s *Sandbox, _ *string) { s.TempDir = "/nonexistent" }, `"mount point"`},
	} {
		t.Run(name, func(t *testing.T) {
			s, root := testSandbox(t)
			c.tune(t, s, &root)
			_, err := run(s, context.Background(), root, []string{"cvm-sbom", "hostile", "sleep"})
			if cause.Of(err) != cause.SandboxUnavailable || !strings.Contains(err.Error(), c.measure) {
				t.Fatalf("got %v, want %s naming %s", err, cause.SandboxUnavailable, c.measure)
			}
		})
	}
}

func TestTheCallersEndIsTheScansEnd(t *testing.T) {
	s, root := testSandbox(t)
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(300*time.Millisecond, cancel)
	if _, err := run(s, ctx, root, []string{"cvm-sbom", "hostile", "sleep"}); cause.Of(err) != cause.Cancelled {
		t.Fatalf("got %v", err)
	}
}

func TestNothingIsLeftBehind(t *testing.T) {
	s, root := testSandbox(t)
	s.TempDir = t.TempDir()
	if _, err := run(s, context.Background(), root, []string{"cvm-sbom", "hostile", "tcp"}); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(s.TempDir)
	if err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || bytes.Contains(mounts, []byte("cvm-sbom")) {
		t.Errorf("a mount is left (%v)", err)
	}
}

func TestAStartedScannerEndsWithItsContext(t *testing.T) {
	s, root := testSandbox(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	p, err := s.start(ctx, []string{"cvm-sbom", "hostile", "sleep"})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := p.cmd.Wait(); err == nil {
		t.Error("it ended by itself")
	}
	if err := p.Scan(context.Background(), root, nil, io.Discard); cause.Of(err) != cause.Cancelled {
		t.Errorf("a scan after that: got %v", err)
	}
}

func TestAStartedScannerThatIsNotUsedLeavesNothing(t *testing.T) {
	s, _ := testSandbox(t)
	s.TempDir = t.TempDir()
	p, err := s.start(context.Background(), []string{"cvm-sbom", "hostile", "sleep"})
	if err != nil {
		t.Fatal(err)
	}
	p.Close()
	p.Close()
	if err := unix.Kill(p.cmd.Process.Pid, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("the process is there (%v)", err)
	}
	if left, err := os.ReadDir(s.TempDir); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestTheImageIsShownWithoutWhatIsMountedBelowIt(t *testing.T) {
	s, root := testSandbox(t)
	if err := os.Mkdir(filepath.Join(root, "below"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", filepath.Join(root, "below"), "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(filepath.Join(root, "below"), 0); err != nil {
			t.Error(err)
		}
	}()
	if err := os.WriteFile(filepath.Join(root, "below", "file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := run(s, context.Background(), root, []string{"cvm-sbom", "hostile", "below"}); err != nil || string(out) != "denied" {
		t.Fatalf("got %q, %v", out, err)
	}
}
