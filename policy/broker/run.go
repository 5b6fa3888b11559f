package broker

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/net/netutil"

	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/broker/audit"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Run serves until ctx ends, then finishes the requests under way. It prints
// one line, "listening on https://HOST:PORT", to out once it accepts
// connections. credentials is systemd's credentials directory or empty.
func Run(ctx context.Context, c *Config, credentials string, logger *slog.Logger, out io.Writer) error {
	opts, err := c.open(credentials, logger)
	if err != nil {
		return err
	}
	defer opts.Store.Close()
	defer opts.Audit.Close()
	server, err := New(*opts)
	if err != nil {
		return err
	}
	cert, err := c.certificate()
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return cause.New(cause.Config, "listen: %w", err)
	}
	addr := l.Addr()
	if err := opts.Audit.Write(audit.Record{Op: "start", Outcome: "ok"}); err != nil {
		_ = l.Close()
		return err
	}
	// One request at a time on a connection, so that the limit on connections
	// bounds what is held: HTTP/2 would allow 250 bodies on each.
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	h := &http.Server{
		Handler:           server,
		Protocols:         &protocols,
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      60 * time.Second,
		IdleTimeout:       60 * time.Second,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
		TLSConfig:         &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13},
	}
	served := make(chan error, 1)
	go func() { served <- h.ServeTLS(netutil.LimitListener(l, c.Limits.Connections), "", "") }()

	fmt.Fprintf(out, "listening on https://%s\n", addr)
	logger.Info("ready", "address", addr.String(), "tees", len(opts.Verifiers), "admin", len(opts.AdminHashes) > 0)
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		logger.Warn("sd_notify failed", "error", err)
	}
	select {
	case err := <-served:
		return cause.New(cause.Internal, "server: %w", err)
	case <-ctx.Done():
	}
	_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
	defer cancel()
	err = h.Shutdown(grace)
	if serr := <-served; err == nil && !errors.Is(serr, http.ErrServerClosed) {
		err = serr
	}
	if werr := opts.Audit.Write(audit.Record{Op: "stop", Outcome: "ok"}); err == nil {
		err = werr
	}
	return cause.Wrap(cause.Internal, err)
}

// open reads every file that the configuration names.
func (c *Config) open(credentials string, logger *slog.Logger) (*Options, error) {
	kek, err := c.kek(credentials)
	if err != nil {
		return nil, err
	}
	defer clear(kek)
	key, err := c.tokenKey()
	if err != nil {
		return nil, err
	}
	hashes, err := c.adminHashes()
	if err != nil {
		return nil, err
	}
	roots, err := c.roots()
	if err != nil {
		return nil, err
	}
	signers, err := c.ruleSigners()
	if err != nil {
		return nil, err
	}
	store, err := OpenStore(c.Storage, kek)
	if err != nil {
		return nil, err
	}
	log, err := audit.Open(c.AuditLog, time.Now)
	if err != nil {
		_ = store.Close()
		return nil, err
	}
	return &Options{
		Store: store, Audit: log, TokenKey: key, AdminHashes: hashes, RuleSigners: signers,
		MaxSessions: c.Limits.Sessions, Logger: logger, Now: time.Now,
		Verifiers: []appraisal.Verifier{
			&appraisal.TPM{EKRoots: roots, ListedEKs: c.ListedEKs, TrustedAKs: c.TrustedAKs},
			&appraisal.TDX{},
		},
	}, nil
}
