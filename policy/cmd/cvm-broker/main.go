// cvm-broker is the key broker.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/policy/broker"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/usage"
)

// version is set by the linker.
var version = ""

func main() { os.Exit(run()) }

// run is main without os.Exit, so that tests can call it.
func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "cvm-broker: %s\n", err)
		return cause.Exit(err)
	}
	return cause.ExitOK
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:           "cvm-broker",
		Short:         "Release keys to confidential VMs that prove what they run",
		Long:          "cvm-broker releases keys to confidential VMs that prove what they run. cvmctl broker administers it.\n\n" + cause.ExitHelp,
		Version:       programVersion(),
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetVersionTemplate("{{.Version}}\n")
	root.AddCommand(initCommand(), serveCommand(), versionCommand())
	usage.Errors(root)
	return root
}

func initCommand() *cobra.Command {
	var o broker.InitOptions
	var roots []string
	c := &cobra.Command{
		Use:   "init --dir DIR --host NAME",
		Short: "Make keys, certificates, an admin token and a configuration",
		Example: "  cvm-broker init --dir /etc/cvm-broker --host broker.example --listen :8443 --ek-root vendor=ek-roots.pem\n" +
			"  cvm-broker init --dir b1 --host broker.example --listen :8443 --name b1 --postgres dsn\n" +
			"  cvm-broker init --dir b2 --join b1 --listen :8443 --name b2\n" +
			"  cvm-broker serve --config /etc/cvm-broker/config.yaml",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, s := range roots {
				r, err := broker.ParseRootFlag(s)
				if err != nil {
					return err
				}
				for _, p := range r.Paths {
					if _, err := os.Stat(p); err != nil {
						return cause.New(cause.Usage, "--ek-root %s: %w", r.Name, err)
					}
				}
				o.EKRoots = append(o.EKRoots, r)
			}
			if o.Dir == "" {
				return cause.New(cause.Usage, "--dir is missing")
			}
			o.Now = time.Now()
			if err := broker.Init(o); err != nil {
				return err
			}
			if o.Join != "" {
				fmt.Fprintf(cmd.OutOrStdout(), "wrote %s/%s with the keys and the certificate of %s\n", o.Dir, broker.FileConfig, o.Join)
				return nil
			}
			fmt.Fprintf(cmd.OutOrStdout(), "wrote %s/%s; policies need %s and %s, admins %s and %s\n",
				o.Dir, broker.FileConfig, broker.FileCA, broker.FileTokenPub, broker.FileCA, broker.FileAdminToken)
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&o.Dir, "dir", "", "directory to make, or an empty one")
	f.StringArrayVar(&o.Hosts, "host", nil, "DNS name or IP address in the server certificate (repeatable)")
	f.StringVar(&o.Listen, "listen", "127.0.0.1:8080", "host:port to listen on; port 0 takes a free one")
	f.StringVar(&o.Name, "name", "", "name in audit records, for one of several brokers")
	f.StringVar(&o.DSNFile, "postgres", "", "file of mode 0600 with a PostgreSQL DSN, which is copied: storage for several brokers")
	f.StringVar(&o.Join, "join", "", "directory of a broker whose database, keys and certificate this one shares")
	f.StringArrayVar(&roots, "ek-root", nil, "NAME=PATH: a set of EK certificate issuers, PEM file or directory (repeatable)")
	return c
}

func serveCommand() *cobra.Command {
	var path, level string
	c := &cobra.Command{
		Use:   "serve --config FILE",
		Short: "Serve the KBS protocol until SIGTERM",
		Long: "Serve the KBS protocol and its admin side until SIGTERM. Standard output says the address once it is\n" +
			"listened on, standard error is the log; what was asked and answered is in the audit log.",
		Example: "  cvm-broker serve --config /etc/cvm-broker/config.yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if path == "" {
				return cause.New(cause.Usage, "--config is missing")
			}
			var l slog.Level
			if err := l.UnmarshalText([]byte(level)); err != nil {
				return cause.New(cause.Usage, "--log-level is %q, expected debug, info, warn or error", level)
			}
			config, err := broker.LoadConfig(path)
			if err != nil {
				return err
			}
			logger := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: l}))
			return broker.Run(cmd.Context(), config, os.Getenv("CREDENTIALS_DIRECTORY"), logger, cmd.OutOrStdout())
		},
	}
	c.Flags().StringVar(&path, "config", "", "configuration file")
	c.Flags().StringVar(&level, "log-level", "info", "debug, info, warn or error")
	return c
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		Run:   func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), programVersion()) },
	}
}

func programVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}
