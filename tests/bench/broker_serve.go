package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strings"
	"time"

	"github.com/google/go-sev-guest/verify/trust"
	"golang.org/x/net/netutil"

	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/collateral"
	"github.com/cc-runtime/cvm-agent/policy/broker"
	"github.com/cc-runtime/cvm-agent/policy/broker/audit"
)

// serveMode is the hidden first argument that makes this program the broker:
// a process of its own, so that its processor time and memory are its own. A
// released cvm-broker cannot be told to trust a made AMD root; this is the same
// server with the same limits, over a directory that broker.Init made.
const serveMode = "serve-broker"

// The files beside broker.Init's.
const (
	fileARK       = "ark.der"
	fileASK       = "ask.der"
	dirCollateral = "collateral"
)

type serveOptions struct {
	dir         string
	sessions    int
	cpuProfile  string
	heapProfile string
}

// serve runs the broker until its standard input ends: it does not outlive who
// started it. It prints its address to out.
func serve(args []string, in io.Reader, out io.Writer) (err error) {
	var o serveOptions
	flags := flag.NewFlagSet(serveMode, flag.ContinueOnError)
	flags.StringVar(&o.dir, "dir", "", "directory made by broker.Init")
	flags.IntVar(&o.sessions, "sessions", 0, "bound on sessions; 0: the configuration's")
	flags.StringVar(&o.cpuProfile, "cpuprofile", "", "write a CPU profile to this file")
	flags.StringVar(&o.heapProfile, "heapprofile", "", "write a heap profile to this file at the end")
	if err := flags.Parse(args); err != nil {
		return err
	}
	broker.CollectSeldom()
	config, err := broker.LoadConfig(filepath.Join(o.dir, broker.FileConfig))
	if err != nil {
		return err
	}
	if o.sessions > 0 {
		config.Limits.Sessions = o.sessions
	}
	options, err := o.open(config)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, options.Audit.Close(), options.Store.Close()) }()
	handler, err := broker.New(*options)
	if err != nil {
		return err
	}
	certificate, err := tls.LoadX509KeyPair(config.TLS.Certificate, config.TLS.Key)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	// As policy/broker's Run has it.
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	server := &http.Server{
		Handler: handler, Protocols: &protocols,
		ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, WriteTimeout: 60 * time.Second, IdleTimeout: 60 * time.Second,
		MaxHeaderBytes: 64 << 10,
		ErrorLog:       slog.NewLogLogger(options.Logger.Handler(), slog.LevelDebug),
		TLSConfig:      &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS13},
	}
	if o.cpuProfile != "" {
		stop, err := profile(o.cpuProfile)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, stop()) }()
	}
	served := make(chan error, 1)
	go func() { served <- server.ServeTLS(netutil.LimitListener(listener, config.Limits.Connections), "", "") }()
	fmt.Fprintln(out, listener.Addr())
	ended := make(chan error, 1)
	go func() { _, err := io.Copy(io.Discard, in); ended <- err }()
	select {
	case err := <-served:
		return err
	case err := <-ended:
		if err != nil {
			return err
		}
	}
	if o.heapProfile != "" {
		if err := heapProfile(o.heapProfile); err != nil {
			return err
		}
	}
	grace, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return errors.Join(server.Shutdown(grace), handler.Close())
}

// open reads what the configuration names, with a verifier for the made chip.
func (o serveOptions) open(c *broker.Config) (*broker.Options, error) {
	verifier, err := madeVerifier(o.dir)
	if err != nil {
		return nil, err
	}
	key, err := privateKey(c.TokenKey)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(c.AdminTokenHashes)
	if err != nil {
		return nil, err
	}
	hash, err := hex.DecodeString(strings.TrimSpace(string(text)))
	if err != nil || len(hash) != 32 {
		return nil, fmt.Errorf("%s is not one SHA-256", c.AdminTokenHashes)
	}
	source, err := c.KEK.Open("")
	if err != nil {
		return nil, err
	}
	store, err := broker.OpenStore(c.Storage, source)
	if err != nil {
		return nil, err
	}
	log, err := audit.Open(c.AuditLog, time.Now)
	if err != nil {
		return nil, errors.Join(err, store.Close())
	}
	return &broker.Options{
		Store: store, Audit: log, TokenKey: key, AdminHashes: [][32]byte{[32]byte(hash)}, Verifiers: []appraisal.Verifier{verifier},
		MaxSessions: c.Limits.Sessions, Now: time.Now,
		// All guests of the load have one address: the limit is there, and high.
		PeerRate: 1e6, PeerBurst: 1e6,
		// As cvm-broker logs: to a stream, from level info on.
		Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	}, nil
}

// madeVerifier trusts the root in dir, and finds its revocation list there.
func madeVerifier(dir string) (*appraisal.SNP, error) {
	var certs trust.ProductCerts
	for name, to := range map[string]**x509.Certificate{fileARK: &certs.Ark, fileASK: &certs.Ask} {
		der, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		if *to, err = x509.ParseCertificate(der); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	root := trust.AMDRootCertsProduct(fleetLine)
	root.ProductCerts = &certs
	return &appraisal.SNP{
		Roots:      map[string][]*trust.AMDRootCerts{fleetLine: {root}},
		Collateral: &collateral.Source{Dir: filepath.Join(dir, dirCollateral)},
	}, nil
}

func privateKey(file string) (*ecdsa.PrivateKey, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, fmt.Errorf("%s holds no PEM", file)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s holds a %T", file, key)
	}
	return ec, nil
}

func profile(path string) (stop func() error, err error) {
	file, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(file); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return func() error { pprof.StopCPUProfile(); return file.Close() }, nil
}

func heapProfile(path string) error {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	runtime.GC()
	return errors.Join(pprof.Lookup("heap").WriteTo(file, 0), file.Close())
}
