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
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/net/netutil"

	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/collateral"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/broker/audit"
	"github.com/cc-runtime/cvm-agent/policy/broker/kek"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Run serves until ctx ends, then finishes the requests under way. It prints
// one line, "listening on https://HOST:PORT", to out once it accepts
// connections. credentials is systemd's credentials directory or empty.
func Run(ctx context.Context, c *Config, credentials string, logger *slog.Logger, out io.Writer) error {
	CollectSeldom()
	opts, err := c.open(ctx, credentials, logger)
	if err != nil {
		return err
	}
	defer opts.Store.Close()
	defer opts.Audit.Close()
	server, err := New(*opts)
	if err != nil {
		return err
	}
	// Whatever happens from here on, the sessions that it read are kept.
	defer server.Close()
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
	metrics, err := c.serveMetrics(server.Metrics(), logger)
	if err != nil {
		_ = l.Close()
		return err
	}
	defer metrics()
	served := make(chan error, 1)
	go func() {
		served <- h.ServeTLS(netutil.LimitListener(limitPeers(l, c.Limits.PeerConnections), c.Limits.Connections), "", "")
	}()

	pruned := make(chan struct{})
	defer func() { <-pruned }()
	ctx, cancelled := context.WithCancel(ctx)
	defer cancelled()
	go func() {
		defer close(pruned)
		c.prune(ctx, opts, logger)
	}()

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
	if cerr := server.Close(); err == nil {
		err = cerr
	}
	if werr := opts.Audit.Write(audit.Record{Op: "stop", Outcome: "ok"}); err == nil {
		err = werr
	}
	return cause.Wrap(cause.Internal, err)
}

// CollectSeldom has the garbage collector run half as often as by default,
// unless the environment's GOGC says how often. With ten thousand sessions held
// it takes both of two processors for tens of milliseconds, and the slowest
// guests are those that came meanwhile.
func CollectSeldom() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(200)
	}
}

// prune forgets guests that do not come back, now and each hour.
func (c *Config) prune(ctx context.Context, o *Options, logger *slog.Logger) {
	if c.Limits.InstanceDays < 0 {
		return
	}
	t := time.NewTicker(time.Hour)
	defer t.Stop()
	for {
		n, err := o.Store.PruneInstances(o.Now().AddDate(0, 0, -c.Limits.InstanceDays))
		if n > 0 {
			err = errors.Join(err, o.Audit.Write(audit.Record{Op: "prune", Outcome: "ok", Reason: fmt.Sprintf("%d instances not seen for %d days", n, c.Limits.InstanceDays)}))
		}
		if err != nil {
			logger.Error("old instances could not be forgotten", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// serveMetrics serves them where the configuration says, until the function
// that it returns is called. They say how much a broker is used, by whom not;
// they are kept from guests by an address of their own.
func (c *Config) serveMetrics(h http.Handler, logger *slog.Logger) (func(), error) {
	if c.MetricsListen == "" {
		return func() {}, nil
	}
	l, err := net.Listen("tcp", c.MetricsListen)
	if err != nil {
		return nil, cause.New(cause.Config, "metricsListen: %w", err)
	}
	s := &http.Server{
		Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
	}
	go func() { _ = s.Serve(netutil.LimitListener(l, 16)) }()
	logger.Info("metrics", "address", "http://"+l.Addr().String()+"/metrics")
	return func() { _ = s.Close() }, nil
}

// open reads every file that the configuration names.
func (c *Config) open(ctx context.Context, credentials string, logger *slog.Logger) (*Options, error) {
	k, err := c.KEK.Open(credentials)
	if err != nil {
		return nil, err
	}
	key, err := c.tokenKey()
	if err != nil {
		return nil, err
	}
	hashes, err := c.adminHashes()
	if err != nil {
		return nil, err
	}
	eks, err := c.roots("ekRoots", c.EKRoots)
	if err != nil {
		return nil, err
	}
	aks, err := c.roots("akRoots", c.AKRoots)
	if err != nil {
		return nil, err
	}
	signers, err := c.ruleSigners()
	if err != nil {
		return nil, err
	}
	vendors, err := c.Collateral.source()
	if err != nil {
		return nil, err
	}
	store, err := c.store(ctx, k)
	if err != nil {
		return nil, err
	}
	log, err := audit.OpenAs(c.Name, c.AuditLog, time.Now)
	if err != nil {
		_ = store.Close()
		return nil, err
	}
	return &Options{
		Store: store, Audit: log, TokenKey: key, AdminHashes: hashes, RuleSigners: signers,
		MaxSessions: c.Limits.Sessions, Logger: logger, Now: time.Now,
		PeerRate: c.Limits.PeerRate, PeerBurst: c.Limits.PeerBurst,
		Verifiers: c.verifiers(eks, aks, vendors),
	}, nil
}

// verifiers are those of every platform whose evidence is accepted.
func (c *Config) verifiers(eks, aks []appraisal.RootSet, vendors *collateral.Source) []appraisal.Verifier {
	snp, tdx := &appraisal.SNP{Collateral: vendors}, &appraisal.TDX{Collateral: vendors}
	return []appraisal.Verifier{
		snp, &appraisal.AzureSNP{SNP: snp},
		&appraisal.TPM{EKRoots: eks, AKRoots: aks, ListedEKs: c.ListedEKs, TrustedAKs: c.TrustedAKs},
		tdx, &appraisal.AzureTDX{TDX: tdx},
	}
}

func (c *Config) store(ctx context.Context, k kek.Source) (*Store, error) {
	if c.Postgres == nil {
		return OpenStore(c.Storage, k)
	}
	dsn, err := bounded.ReadSecret(c.Postgres.DSNFile, maxDSN)
	if err != nil {
		return nil, cause.New(cause.Config, "postgres.dsnFile: %w", err)
	}
	return OpenPostgresStore(ctx, strings.TrimSpace(string(dsn)), c.Postgres.Connections, k)
}
