package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-sev-guest/abi"
	"github.com/google/go-sev-guest/kds"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/collateral"
	"github.com/cc-runtime/cvm-agent/policy/broker"
	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
)

// brokerProcess is this program again, as the broker.
type brokerProcess struct {
	dir     string
	address string
	tls     *tls.Config
	command *exec.Cmd
	stdin   io.Closer
	log     bytes.Buffer // its standard error
}

// startBroker makes a broker in dir that knows the fleet's chip and holds its
// key, and runs it.
func startBroker(ctx context.Context, dir string, f *fleet, flags ...string) (*brokerProcess, error) {
	if err := prepareBroker(dir, f); err != nil {
		return nil, err
	}
	p := &brokerProcess{dir: dir}
	ca, err := os.ReadFile(filepath.Join(dir, broker.FileCA))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, errors.New("the broker's root holds no certificate")
	}
	p.tls = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13, ServerName: "127.0.0.1"}
	if err := p.start(ctx, flags); err != nil {
		return nil, err
	}
	if err := p.provision(ctx, ca, f); err != nil {
		return nil, errors.Join(err, p.stop())
	}
	return p, nil
}

func prepareBroker(dir string, f *fleet) error {
	if err := broker.Init(broker.InitOptions{Dir: dir, Hosts: []string{"127.0.0.1"}, Listen: "127.0.0.1:0", Now: time.Now()}); err != nil {
		return err
	}
	now := time.Now()
	crl := f.chain.CRL(made{}, now.Add(-time.Hour), now.Add(24*time.Hour))
	return errors.Join(
		os.WriteFile(filepath.Join(dir, fileARK), f.chain.Signer.Ark.Raw, 0o600),
		os.WriteFile(filepath.Join(dir, fileASK), f.chain.Signer.Ask.Raw, 0o600),
		(&collateral.Source{Dir: filepath.Join(dir, dirCollateral)}).Put(kds.CrlLinkByKey(fleetLine, abi.VcekReportSigner), collateral.Piece{Body: crl}),
	)
}

func (p *brokerProcess) start(ctx context.Context, flags []string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	p.command = exec.CommandContext(ctx, self, append([]string{serveMode, "-dir", p.dir}, flags...)...)
	p.command.Stderr = &p.log
	out, err := p.command.StdoutPipe()
	if err != nil {
		return err
	}
	if p.stdin, err = p.command.StdinPipe(); err != nil {
		return err
	}
	if err := p.command.Start(); err != nil {
		return err
	}
	if p.address, err = bufio.NewReader(out).ReadString('\n'); err != nil {
		return errors.Join(fmt.Errorf("the broker gave no address: %w", err), p.stop())
	}
	p.address = strings.TrimSpace(p.address)
	return nil
}

// stop lets the broker end by itself.
func (p *brokerProcess) stop() error {
	_ = p.stdin.Close()
	if err := p.command.Wait(); err != nil {
		return fmt.Errorf("the broker: %w: %s", err, lastLines(p.log.String(), 3))
	}
	return nil
}

func (p *brokerProcess) pid() int { return p.command.Process.Pid }

// provision stores the resource with its rule and the policy's mark, as an
// admin would.
func (p *brokerProcess) provision(ctx context.Context, ca []byte, f *fleet) error {
	token, err := os.ReadFile(filepath.Join(p.dir, broker.FileAdminToken))
	if err != nil {
		return err
	}
	admin, err := adminclient.New("https://"+p.address, ca, string(token))
	if err != nil {
		return err
	}
	if err := admin.PutResource(ctx, fleetResource, fleetKey); err != nil {
		return err
	}
	if err := admin.PutRule(ctx, fleetResource, f.rule()); err != nil {
		return err
	}
	return admin.SetMark(ctx, fleetPolicy, adminclient.Mark{Version: fleetVersion, Signers: []string{f.signer}})
}

// connections dials so many.
func (p *brokerProcess) connections(ctx context.Context, n int) (list []*connection, hangUp func(), err error) {
	hangUp = func() {
		for _, c := range list {
			c.close()
		}
	}
	for range n {
		c, err := connect(ctx, p.address, p.tls)
		if err != nil {
			hangUp()
			return nil, nil, err
		}
		list = append(list, c)
	}
	return list, hangUp, nil
}

// brokerMemory is the broker's PSS in MiB: all of it, and the part that is its
// storage file, mapped. That part is stored data, grows with the number of
// guests ever seen, and on a disk the kernel takes it back when it likes.
type brokerMemory struct{ PSS, Storage float64 }

func (p *brokerProcess) memory() (brokerMemory, error) {
	m := brokerMemory{PSS: pssOf(p.pid())}
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", p.pid()))
	if err != nil || m.PSS == 0 {
		return m, errors.Join(err, errors.New("the broker's memory cannot be read"))
	}
	m.Storage = mappedPSS(string(maps), filepath.Join(p.dir, "broker.db"))
	return m, nil
}

// mappedPSS sums what the mappings of a file have, in MiB, in the text of
// /proc/PID/smaps: a line with addresses that ends in the file's name, then
// its fields.
func mappedPSS(maps, file string) float64 {
	var sum float64
	inside := false
	for line := range strings.Lines(maps) {
		fields := strings.Fields(line)
		switch {
		case len(fields) == 0:
		case !strings.HasSuffix(fields[0], ":"): // START-END perms offset device inode [name]
			inside = fields[len(fields)-1] == file
		case inside && fields[0] == "Pss:" && len(fields) == 3:
			if kib, err := strconv.ParseFloat(fields[1], 64); err == nil {
				sum += kib / 1024
			}
		}
	}
	return sum
}
