package rig

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
)

// Broker is cvm-broker over storage of its own, made by `cvm-broker init`.
type Broker struct {
	*Process
	Dir        string
	URL        string // https://127.0.0.1:port
	Config     string // configuration file
	CA         string // PEM file: the root of its TLS certificate
	TokenKey   string // PEM file: the public key of its tokens
	AdminToken string // file with the bearer token of its admin side
	Audit      string // audit log, NDJSON

	rig *Rig
}

// AuditRecord is one line of the audit log, as far as tests look at it.
type AuditRecord struct {
	Seq      uint64 `json:"seq"`
	Op       string `json:"op"` // auth, attest, release, admin.…, start, stop
	Instance string `json:"instance"`
	Resource string `json:"resource"`
	Policy   string `json:"policy"`
	Outcome  string `json:"outcome"` // ok or refused
	Reason   string `json:"reason"`
}

func (a AuditRecord) String() string {
	return strings.TrimSpace(fmt.Sprintf("%s %s %s %s", a.Op, a.Outcome, a.Resource, a.Reason))
}

// EKRootName is the name that StartBroker gives to the TPM roots.
const EKRootName = "rig"

// StartBroker initialises and starts a broker that trusts the EK issuers in
// ekRoots, a PEM file. Its certificate holds for hosts beside the loopback: a
// machine of ours has another name for it.
func (r *Rig) StartBroker(ctx context.Context, ekRoots string, hosts ...string) (*Broker, error) {
	dir := r.Path(r.name("broker"))
	// A fixed port, so that Restart comes back where policies expect it.
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	argv := []string{r.Program("cvm-broker"), "init", "--dir", dir, "--listen", address, "--ek-root", EKRootName + "=" + ekRoots}
	for _, host := range append([]string{"127.0.0.1"}, hosts...) {
		argv = append(argv, "--host", host)
	}
	if _, err := r.Run(ctx, nil, argv...); err != nil {
		return nil, err
	}
	b := &Broker{
		rig: r, Dir: dir,
		URL:        "https://" + address,
		Config:     filepath.Join(dir, "config.yaml"),
		CA:         filepath.Join(dir, "ca.pem"),
		TokenKey:   filepath.Join(dir, "token.pub"),
		AdminToken: filepath.Join(dir, "admin.token"),
		Audit:      filepath.Join(dir, "audit.ndjson"),
	}
	return b, b.Restart(ctx)
}

// Restart starts the broker again over the same storage and address, stopping
// it first if it runs.
func (b *Broker) Restart(ctx context.Context) error {
	if b.Process != nil {
		b.Stop()
	}
	p, err := b.rig.Start(filepath.Base(b.Dir), nil, b.rig.Program("cvm-broker"), "serve", "--config", b.Config)
	if err != nil {
		return err
	}
	b.Process = p
	return p.ready(ctx, readyWithin, func() error {
		c, err := net.Dial("tcp", strings.TrimPrefix(b.URL, "https://"))
		if err == nil {
			c.Close()
		}
		return err
	})
}

// Flags are those that make cvmctl talk to this broker as its admin.
func (b *Broker) Flags() []string {
	return []string{"--broker-url", b.URL, "--broker-ca", b.CA, "--broker-token-file", b.AdminToken}
}

// Records reads the audit log.
func (b *Broker) Records() ([]AuditRecord, error) {
	file, err := os.Open(b.Audit)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	var records []AuditRecord
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var a AuditRecord
		if err := json.Unmarshal(lines.Bytes(), &a); err != nil {
			return nil, fmt.Errorf("audit log: %w", err)
		}
		records = append(records, a)
	}
	return records, lines.Err()
}

// Since returns the records after the first n that match op, outcome and
// resource; "" matches anything.
func (b *Broker) Since(n int, op, outcome, resource string) ([]AuditRecord, error) {
	records, err := b.Records()
	if err != nil {
		return nil, err
	}
	if n > len(records) {
		return nil, errors.New("the audit log has become shorter")
	}
	var matching []AuditRecord
	for _, a := range records[n:] {
		if (op == "" || a.Op == op) && (outcome == "" || a.Outcome == outcome) && (resource == "" || strings.HasSuffix(resource, a.Resource) && a.Resource != "") {
			matching = append(matching, a)
		}
	}
	return matching, nil
}
