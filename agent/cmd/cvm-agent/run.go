package main

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"github.com/coreos/go-systemd/v22/journal"
	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/agent/launch"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

func runCommand() *cobra.Command {
	var config string
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the daemon: launch, then watch and take orders",
		Long: "Run the daemon. A launch that fails ends it with one line, `cvm-agent: PHASE: CODE: TEXT`, and the exit\n" +
			"status that belongs to the code; nothing of the launch is left then.",
		Example: "  cvm-agent run --config /etc/cvm-agent/agent.yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if uid := os.Geteuid(); uid != 0 {
				return cause.New(cause.NotPermitted, "run is started by user %d, expected root: it mounts and unpacks images", uid)
			}
			return launch.Main(cmd.Context(), config, programVersion(), logger())
		},
	}
	cmd.Flags().StringVar(&config, "config", "/etc/cvm-agent/agent.yaml", "the agent's configuration `FILE`")
	return cmd
}

// logger writes to the journal under systemd and to stderr elsewhere.
func logger() *slog.Logger {
	if ok, err := journal.StderrIsJournalStream(); err == nil && ok {
		return slog.New(&journalHandler{})
	}
	return slog.New(textHandler(os.Stderr))
}

// textHandler leaves out what workloads wrote: stderr may be a console, and a
// guest's console is the host's.
func textHandler(w io.Writer) slog.Handler {
	return slog.NewTextHandler(w, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == launch.LogKey {
			return slog.Attr{}
		}
		return a
	}})
}

func oneLine(err error) string {
	text := err.Error()
	if !isCode(err) && !strings.HasPrefix(text, string(cause.Usage)) {
		// cobra's own errors, such as an unknown command, carry no code.
		text = fmt.Sprintf("%s: %s", cause.Of(err), text)
	}
	return strings.Join(strings.Fields(text), " ")
}
