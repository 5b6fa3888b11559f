// Package postgrestest runs a PostgreSQL server of Debian's package for tests,
// in a directory of its own and on a UNIX socket alone.
package postgrestest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// Server is a running server.
type Server struct {
	dir string
	cmd *exec.Cmd
	n   atomic.Int32
}

// Start makes a cluster and runs it; the caller calls Stop. PostgreSQL refuses
// to be root: as root it runs as the package's user.
func Start() (s *Server, err error) {
	list, _ := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if len(list) == 0 {
		return nil, fmt.Errorf("no PostgreSQL below /usr/lib/postgresql: tests/deps.sh apt installs it")
	}
	slices.Sort(list)
	bin := filepath.Dir(list[len(list)-1])
	s = &Server{}
	// Not the test's own directory: a socket's path has at most 107 bytes.
	if s.dir, err = os.MkdirTemp("/tmp", "cvm-pg"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.Stop()
		}
	}()
	attr := &syscall.SysProcAttr{Pdeathsig: syscall.SIGQUIT}
	if os.Getuid() == 0 {
		u, err := user.Lookup("postgres")
		if err != nil {
			return nil, err
		}
		uid, err1 := strconv.Atoi(u.Uid)
		gid, err2 := strconv.Atoi(u.Gid)
		if err1 != nil || err2 != nil {
			return nil, fmt.Errorf("user postgres has ids %q and %q", u.Uid, u.Gid)
		}
		if err := os.Chown(s.dir, uid, gid); err != nil {
			return nil, err
		}
		attr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)} //nolint:gosec // from the user database
	}
	data := filepath.Join(s.dir, "data")
	init := exec.Command(filepath.Join(bin, "initdb"), "-D", data, "-U", "broker", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C")
	init.Dir, init.SysProcAttr = s.dir, &syscall.SysProcAttr{Credential: attr.Credential}
	if out, err := init.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("initdb: %w: %s", err, out)
	}
	log, err := os.Create(filepath.Join(s.dir, "log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	s.cmd = exec.Command(filepath.Join(bin, "postgres"), "-D", data, "-k", s.dir, "-c", "listen_addresses=", "-c", "max_connections=200")
	s.cmd.Dir, s.cmd.SysProcAttr, s.cmd.Stdout, s.cmd.Stderr = s.dir, attr, log, log
	if err := s.cmd.Start(); err != nil {
		s.cmd = nil
		return nil, err
	}
	for range 300 {
		if err = s.exec("SELECT 1"); err == nil {
			return s, nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	text, _ := os.ReadFile(log.Name())
	return nil, fmt.Errorf("postgres does not answer: %w: %s", err, text)
}

// Stop ends the server and removes everything.
func (s *Server) Stop() {
	if s.cmd != nil {
		_ = s.cmd.Process.Signal(syscall.SIGQUIT)
		_ = s.cmd.Wait()
	}
	_ = os.RemoveAll(s.dir)
}

func (s *Server) dsn(database string) string {
	return fmt.Sprintf("host=%s user=broker dbname=%s", s.dir, database)
}

func (s *Server) exec(sql string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	c, err := pgx.Connect(ctx, s.dsn("postgres"))
	if err != nil {
		return err
	}
	defer c.Close(ctx)
	_, err = c.Exec(ctx, sql)
	return err
}

// Database makes an empty database and returns its DSN.
func (s *Server) Database(t testing.TB) string {
	t.Helper()
	name := fmt.Sprintf("db%d", s.n.Add(1))
	if err := s.exec("CREATE DATABASE " + name); err != nil {
		t.Fatal(err)
	}
	return s.dsn(name)
}
