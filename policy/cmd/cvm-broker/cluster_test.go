package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tpmtest"
	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
	"github.com/cc-runtime/cvm-agent/policy/broker/audit"
	"github.com/cc-runtime/cvm-agent/policy/broker/postgrestest"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

const clusterKey = "kbs:///default/key/1"

// node is one broker process.
type node struct {
	dir, url string
	cmd      *exec.Cmd
}

// startNode runs the real program: the test binary itself, which the test
// scripts' TestMain put on PATH under its name.
func startNode(t *testing.T, dir string) *node {
	t.Helper()
	n := &node{dir: dir, cmd: exec.Command("cvm-broker", "serve", "--config", filepath.Join(dir, "config.yaml"), "--log-level", "error")}
	n.cmd.Stderr = os.Stderr
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := n.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = n.cmd.Process.Kill()
		_ = n.cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("%s: %v", dir, err)
	}
	n.url = strings.TrimSpace(strings.TrimPrefix(line, "listening on "))
	return n
}

// cluster is three brokers of one database, made as an operator makes them.
type cluster struct {
	nodes []*node
	http  *http.Client
	next  atomic.Uint32
	tpm   *tpmtest.TPM
	quote sync.Mutex // one TPM serves all guests
}

func startCluster(t *testing.T) *cluster {
	t.Helper()
	pg, err := postgrestest.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pg.Stop)
	base := t.TempDir()
	dsn := filepath.Join(base, "dsn")
	if err := os.WriteFile(dsn, []byte(pg.Database(t)), 0o600); err != nil {
		t.Fatal(err)
	}
	c := &cluster{tpm: tpmtest.Start(t, tpmtest.NewCA(t), tpmtest.ECC)}
	init := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("cvm-broker", append([]string{"init", "--listen", "127.0.0.1:0"}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	dir := func(i int) string { return filepath.Join(base, fmt.Sprintf("b%d", i)) }
	init("--dir", dir(1), "--host", "127.0.0.1", "--name", "b1", "--postgres", dsn)
	ak := sha256.Sum256(c.tpm.AKSPKI)
	f, err := os.OpenFile(filepath.Join(dir(1), "config.yaml"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprintf(f, "trustedAKs: [%s]\nlimits: {peerRate: -1}\n", hex.EncodeToString(ak[:])); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	init("--dir", dir(2), "--name", "b2", "--join", dir(1))
	init("--dir", dir(3), "--name", "b3", "--join", dir(2))
	for i := 1; i <= 3; i++ {
		c.nodes = append(c.nodes, startNode(t, dir(i)))
	}
	ca, err := os.ReadFile(filepath.Join(dir(3), "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, MaxIdleConnsPerHost: 16}
	t.Cleanup(transport.CloseIdleConnections)
	c.http = &http.Client{Transport: transport, Timeout: 20 * time.Second}

	token, err := os.ReadFile(filepath.Join(dir(1), "admin.token"))
	if err != nil {
		t.Fatal(err)
	}
	admin, err := adminclient.New(c.nodes[2].url, ca, string(token))
	if err != nil {
		t.Fatal(err)
	}
	rule := release.Rule{APIVersion: release.RuleAPIVersion, Platforms: []string{"tpm"}, AnyPolicy: true}
	if err := errors.Join(admin.PutResource(context.Background(), clusterKey, []byte("the key")), admin.PutRule(context.Background(), clusterKey, rule)); err != nil {
		t.Fatal(err)
	}
	return c
}

// guest is one run of the protocol, over whatever broker answers.
type clusterGuest struct {
	c      *cluster
	cookie string
	key    *ecdsa.PrivateKey
	body   string // of POST attest
	token  string
}

// do sends to one broker.
func (c *cluster) do(n *node, method, path, cookie, bearer, body string) (int, []byte, http.Header, error) {
	req, err := http.NewRequest(method, n.url+path, strings.NewReader(body))
	if err != nil {
		return 0, nil, nil, err
	}
	if cookie != "" {
		req.Header.Set("Cookie", cookie)
	}
	if bearer != "" {
		req.Header.Set("Authorization", "Bearer "+bearer)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, nil, nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, b, resp.Header, err
}

// any plays the load balancer: brokers in turn, the next when one does not answer.
func (c *cluster) any(method, path, cookie, bearer, body string) (status int, b []byte, h http.Header, err error) {
	for range 6 {
		n := c.nodes[int(c.next.Add(1))%len(c.nodes)]
		if status, b, h, err = c.do(n, method, path, cookie, bearer, body); err == nil && status != http.StatusServiceUnavailable {
			return status, b, h, nil
		}
	}
	return status, b, h, err
}

// open opens a session and quotes for it.
func (c *cluster) open(ask func(method, path, cookie, bearer, body string) (int, []byte, http.Header, error)) (*clusterGuest, error) {
	status, b, h, err := ask("POST", kbs.PathAuth, "", "", `{"version":"0.4.0","tee":"tpm","extra-params":""}`)
	if err != nil || status != 200 {
		return nil, fmt.Errorf("auth: %d %s, %w", status, b, err)
	}
	challenge, err := kbs.DecodeChallenge(b)
	if err != nil {
		return nil, err
	}
	g := &clusterGuest{c: c, cookie: h.Get("Set-Cookie")}
	if g.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	key, err := kbs.NewTEEPubKey(&g.key.PublicKey)
	if err != nil {
		return nil, err
	}
	rd, err := kbs.ReportData("", challenge.Nonce, key)
	if err != nil {
		return nil, err
	}
	c.quote.Lock()
	evidence, err := json.Marshal(c.tpm.Evidence(rd, 0, 8, 14))
	c.quote.Unlock()
	if err != nil {
		return nil, err
	}
	body, err := json.Marshal(kbs.AttestRequest{RuntimeData: kbs.RuntimeData{Nonce: challenge.Nonce, TEEPubKey: key}, TEEEvidence: kbs.CompositeEvidence{PrimaryEvidence: evidence}})
	g.body = string(body)
	return g, err
}

func (g *clusterGuest) attest() error {
	status, b, _, err := g.c.any("POST", kbs.PathAttest, g.cookie, "", g.body)
	if err != nil || status != 200 {
		return fmt.Errorf("attest: %d %s, %w", status, b, err)
	}
	r, err := kbs.DecodeAttestResponse(b)
	if err == nil {
		g.token = r.Token
	}
	return err
}

// fetch gets the key and decrypts it.
func (g *clusterGuest) fetch(cookie, bearer string) error {
	status, b, _, err := g.c.any("GET", kbs.PathResource+"default/key/1", cookie, bearer, "")
	if err != nil || status != 200 {
		return fmt.Errorf("resource: %d %s, %w", status, b, err)
	}
	obj, err := jose.ParseEncryptedJSON(string(b), []jose.KeyAlgorithm{jose.ECDH_ES_A256KW}, []jose.ContentEncryption{jose.A256GCM})
	if err != nil {
		return err
	}
	data, err := obj.Decrypt(g.key)
	if err == nil && string(data) != "the key" {
		err = fmt.Errorf("the key is %q", data)
	}
	return err
}

// Three brokers behind a load balancer, one killed in the middle of it: no
// guest goes without its key, no nonce is accepted twice, and sessions of the
// killed one go on at the others.
func TestThreeBrokersOneKilled(t *testing.T) {
	c := startCluster(t)
	killed := c.nodes[1]
	onKilled := func(method, path, cookie, bearer, body string) (int, []byte, http.Header, error) {
		return c.do(killed, method, path, cookie, bearer, body)
	}
	opened, err := c.open(onKilled)
	if err != nil {
		t.Fatal(err)
	}
	done, err := c.open(onKilled)
	if err != nil {
		t.Fatal(err)
	}
	if status, b, _, err := onKilled("POST", kbs.PathAttest, done.cookie, "", done.body); err != nil || status != 200 {
		t.Fatalf("%d %s, %v", status, b, err)
	} else if r, err := kbs.DecodeAttestResponse(b); err != nil {
		t.Fatal(err)
	} else {
		done.token = r.Token
	}

	var keys, again atomic.Int32
	var wg sync.WaitGroup
	half, rest := make(chan struct{}), make(chan struct{})
	const clients, each = 8, 12
	for i := range clients {
		wg.Go(func() {
			for k := range each {
				if k == each/2 && i == 0 {
					close(half)
				}
				if k == each-2 { // some are left for after the kill
					<-rest
				}
				for try := 0; ; try++ {
					g, err := c.open(c.any)
					if err == nil {
						err = g.attest()
					}
					if err == nil {
						err = g.fetch(g.cookie, "")
					}
					if err == nil {
						keys.Add(1)
						break
					}
					// What was under way on the killed broker is begun anew.
					if again.Add(1); try == 3 {
						t.Errorf("a guest went without its key: %v", err)
						break
					}
				}
			}
		})
	}
	<-half
	if err := killed.cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = killed.cmd.Wait()
	close(rest)
	wg.Wait()
	t.Logf("%d keys, %d runs begun anew", keys.Load(), again.Load())
	if keys.Load() != clients*each {
		t.Errorf("%d of %d keys", keys.Load(), clients*each)
	}
	if err := opened.attest(); err != nil {
		t.Errorf("a session opened on the killed broker: %v", err)
	} else if err := opened.fetch("", opened.token); err != nil {
		t.Errorf("and its token: %v", err)
	}
	if err := errors.Join(done.fetch(done.cookie, ""), done.fetch("", done.token)); err != nil {
		t.Errorf("a session attested on the killed broker: %v", err)
	}
	if first := done.token; done.attest() != nil || done.token != first {
		t.Error("an attested session got another token at another broker")
	}
	checkNoncesOnce(t, c, int(keys.Load())+2)
}

// The same evidence at three brokers at the same moment: one token, in as many
// answers as there may be.
func TestOneNonceAtThreeBrokers(t *testing.T) {
	c := startCluster(t)
	const rounds = 20
	for range rounds {
		g, err := c.open(c.any)
		if err != nil {
			t.Fatal(err)
		}
		var tokens sync.Map
		var wg sync.WaitGroup
		for i := range 6 {
			wg.Go(func() {
				status, b, _, err := c.do(c.nodes[i%3], "POST", kbs.PathAttest, g.cookie, "", g.body)
				if err != nil {
					t.Error(err)
					return
				}
				if status == 200 {
					tokens.Store(string(b), true)
				} else if e := kbs.DecodeError(status, b); e.Variant() != kbs.VariantAttestationError || !strings.Contains(e.Body.Detail, "spent") {
					t.Errorf("%v", e)
				}
			})
		}
		wg.Wait()
		n := 0
		tokens.Range(func(any, any) bool { n++; return true })
		if n != 1 {
			t.Errorf("%d tokens for one nonce", n)
		}
	}
	checkNoncesOnce(t, c, rounds)
}

// checkNoncesOnce reads the audit logs of all brokers.
func checkNoncesOnce(t *testing.T, c *cluster, least int) {
	t.Helper()
	accepted := map[string]int{}
	for i, n := range c.nodes {
		text, err := os.ReadFile(filepath.Join(n.dir, "audit.ndjson"))
		if err != nil {
			t.Fatal(err)
		}
		end := strings.LastIndexByte(string(text), '\n') + 1 // a kill may have torn the last line
		if _, err := audit.Verify(strings.NewReader(string(text[:end]))); err != nil {
			t.Errorf("%s: %v", n.dir, err)
		}
		for line := range strings.Lines(string(text[:end])) {
			var r audit.Record
			if err := json.Unmarshal([]byte(line), &r); err != nil {
				t.Fatal(err)
			}
			if want := fmt.Sprintf("b%d", i+1); r.Broker != want {
				t.Fatalf("a record of %s names broker %q", want, r.Broker)
			}
			if r.Op == "attest" && r.Outcome == "ok" {
				accepted[r.Session]++
			}
		}
	}
	if len(accepted) < least {
		t.Errorf("%d accepted attestations on record, at least %d were made", len(accepted), least)
	}
	for session, n := range accepted {
		if n != 1 {
			t.Errorf("session %s was accepted %d times", session, n)
		}
	}
}
