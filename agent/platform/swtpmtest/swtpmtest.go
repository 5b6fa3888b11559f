// Package swtpmtest runs a software TPM (swtpm) with an EK certificate of a CA
// of its own. Only tests and tests/rig import it: a software TPM proves nothing
// about hardware.
package swtpmtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// TPM is a running swtpm.
type TPM struct {
	Spec   string // "unix:PATH", as platform.OpenTPM takes it
	Socket string
	Roots  []byte // PEM of the CA that signed the EK certificate
	dir    string
	cmd    *exec.Cmd
}

// Start makes and starts a TPM with its state, its CA and its socket in dir,
// which must have a short path (a socket's is at most 107 bytes).
func Start(dir string) (*TPM, error) { return start(dir, "--create-ek-cert", "--lock-nvram") }

// StartWithoutEKCert is Start for a TPM that nobody certified: it has no Roots.
func StartWithoutEKCert(dir string) (*TPM, error) { return start(dir) }

func start(dir string, with ...string) (*TPM, error) {
	t := &TPM{dir: dir, Socket: filepath.Join(dir, "swtpm.sock")}
	t.Spec = "unix:" + t.Socket
	state := filepath.Join(dir, "state")
	ca := filepath.Join(dir, "ca")
	for _, d := range []string{state, ca} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	files := map[string]string{
		"localca.conf":    fmt.Sprintf("statedir = %s\nsigningkey = %s/signkey.pem\nissuercert = %s/issuercert.pem\ncertserial = %s/certserial\n", ca, ca, ca, ca),
		"localca.options": "--platform-manufacturer test\n--platform-version 1\n--platform-model swtpm\n",
	}
	files["setup.conf"] = fmt.Sprintf("create_certs_tool = /usr/bin/swtpm_localca\ncreate_certs_tool_config = %s/localca.conf\ncreate_certs_tool_options = %s/localca.options\nactive_pcr_banks = sha256\n", dir, dir)
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	setup := exec.Command("swtpm_setup", append(with, "--tpm2", "--tpmstate", state,
		"--pcr-banks", "sha256", "--config", filepath.Join(dir, "setup.conf"), "--overwrite")...)
	if out, err := setup.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("swtpm_setup (is swtpm-tools installed? make deps): %w\n%s", err, out)
	}
	if len(with) == 0 {
		return t, t.start()
	}
	// The EK certificate's issuer, then the root that swtpm_localca made for it.
	for _, name := range []string{"issuercert.pem", "swtpm-localca-rootca-cert.pem"} {
		pem, err := os.ReadFile(filepath.Join(ca, name))
		if err != nil {
			return nil, err
		}
		t.Roots = append(t.Roots, pem...)
	}
	return t, t.start()
}

func (t *TPM) start() error {
	_ = os.Remove(t.Socket)
	t.cmd = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+filepath.Join(t.dir, "state"),
		"--server", "type=unixio,path="+t.Socket, "--flags", "not-need-init,startup-clear")
	t.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	log := &strings.Builder{}
	t.cmd.Stderr = log
	if err := t.cmd.Start(); err != nil {
		return fmt.Errorf("start swtpm (is it installed? make deps): %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for ctx.Err() == nil {
		c, err := net.Dial("unix", t.Socket)
		if err == nil {
			return c.Close()
		}
		time.Sleep(10 * time.Millisecond)
	}
	_ = t.Stop()
	return errors.New("swtpm does not listen: " + log.String())
}

// Reboot restarts the TPM as a reboot of the guest does: PCRs are zero again,
// the EK is the same.
func (t *TPM) Reboot() error {
	if err := t.Stop(); err != nil {
		return err
	}
	return t.start()
}

// PID is the process ID of swtpm.
func (t *TPM) PID() int { return t.cmd.Process.Pid }

// Stop stops the TPM. It may be called twice.
func (t *TPM) Stop() error {
	if t.cmd == nil || t.cmd.Process == nil {
		return nil
	}
	_ = t.cmd.Process.Signal(syscall.SIGTERM)
	done := make(chan struct{})
	go func() { _ = t.cmd.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		_ = t.cmd.Process.Kill()
		<-done
	}
	t.cmd = nil
	return nil
}
