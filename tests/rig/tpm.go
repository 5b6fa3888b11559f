package rig

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
)

// TPM is a software TPM 2.0 with an RSA endorsement key, its certificate in
// NV storage, issued by a certificate authority made for the purpose.
type TPM struct {
	*Process
	Socket string // raw TPM commands on a unix socket
	Spec   string // the same as our programs take it: unix:PATH
	Roots  string // PEM file: the authority's root and its issuing certificate

	rig   *Rig
	state string
}

// TPMAuthority makes certificate authorities apart: TPMs made with the same
// one share a root.
type TPMAuthority string

// StartTPM manufactures a TPM whose EK certificate comes from the named
// authority ("" is "ca"; it is made on first use) and powers it on.
func (r *Rig) StartTPM(ctx context.Context, authority TPMAuthority) (*TPM, error) {
	t, err := r.NewTPM(ctx, authority)
	if err != nil {
		return nil, err
	}
	return t, t.PowerOn(ctx)
}

// NewTPM is StartTPM without the power: a Machine has it plugged in.
func (r *Rig) NewTPM(ctx context.Context, authority TPMAuthority) (*TPM, error) {
	if authority == "" {
		authority = "ca"
	}
	name := r.name("tpm")
	dir, ca := r.Path(name), r.Path("tpm-"+string(authority))
	t := &TPM{rig: r, state: filepath.Join(dir, "state"), Socket: filepath.Join(dir, "tpm.sock"), Roots: filepath.Join(ca, "roots.pem")}
	t.Spec = "unix:" + t.Socket
	for _, d := range []string{t.state, ca} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	files := map[string]string{
		"localca.conf": fmt.Sprintf("statedir = %s\nsigningkey = %s/signkey.pem\nissuercert = %s/issuercert.pem\ncertserial = %s/certserial\n", ca, ca, ca, ca),
		"options":      "--platform-manufacturer cvm-agent\n--platform-version 1\n--platform-model rig\n",
		"setup.conf":   fmt.Sprintf("create_certs_tool = /usr/bin/swtpm_localca\ncreate_certs_tool_config = %s/localca.conf\ncreate_certs_tool_options = %s/options\n", dir, dir),
	}
	for file, text := range files {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	if _, err := r.Run(ctx, nil, "swtpm_setup", "--tpm2", "--tpmstate", t.state, "--config", filepath.Join(dir, "setup.conf"),
		"--create-ek-cert", "--lock-nvram", "--pcr-banks", "sha256,sha384", "--logfile", filepath.Join(dir, "setup.log")); err != nil {
		return nil, err
	}
	var roots strings.Builder
	for _, file := range []string{"swtpm-localca-rootca-cert.pem", "issuercert.pem"} {
		pem, err := os.ReadFile(filepath.Join(ca, file))
		if err != nil {
			return nil, err
		}
		// certtool writes a description above some of its certificates.
		if i := strings.Index(string(pem), "-----BEGIN"); i > 0 {
			pem = pem[i:]
		}
		roots.Write(pem)
	}
	if err := os.WriteFile(t.Roots, []byte(roots.String()), 0o600); err != nil {
		return nil, err
	}
	return t, nil
}

// PlugIn starts the TPM for a machine monitor, which powers it on and off and
// talks to it over the returned control socket. It ends with the machine.
func (t *TPM) PlugIn(ctx context.Context) (control string, err error) {
	if t.Process != nil {
		t.Stop()
	}
	control = t.Socket + ".ctrl"
	if err := os.Remove(control); err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	t.Process, err = t.rig.Start(filepath.Base(filepath.Dir(t.state)), nil, "swtpm", "socket", "--tpm2",
		"--tpmstate", "dir="+t.state, "--ctrl", "type=unixio,path="+control+",mode=0600", "--terminate")
	if err != nil {
		return "", err
	}
	return control, t.ready(ctx, readyWithin, func() error {
		_, err := os.Stat(control)
		return err
	})
}

// PowerOn starts the TPM: all registers are reset, as by a reboot of the
// machine. Certificates and keys in NV storage stay.
func (t *TPM) PowerOn(ctx context.Context) error {
	if t.Process != nil {
		t.Stop()
	}
	for _, socket := range []string{t.Socket, t.Socket + ".ctrl"} {
		if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	// Without --terminate it survives its client's disconnection, as a TPM does.
	p, err := t.rig.Start(filepath.Base(filepath.Dir(t.state)), nil, "swtpm", "socket", "--tpm2",
		"--tpmstate", "dir="+t.state, "--server", "type=unixio,path="+t.Socket+",mode=0600",
		"--ctrl", "type=unixio,path="+t.Socket+".ctrl,mode=0600", "--flags", "not-need-init,startup-clear")
	if err != nil {
		return err
	}
	t.Process = p
	return p.ready(ctx, readyWithin, func() error {
		// Connect to the control socket: a connection to the other one would be
		// the single client that swtpm serves at a time. It may come later.
		if _, err := os.Stat(t.Socket); err != nil {
			return err
		}
		c, err := net.Dial("unix", t.Socket+".ctrl")
		if err == nil {
			c.Close()
		}
		return err
	})
}
