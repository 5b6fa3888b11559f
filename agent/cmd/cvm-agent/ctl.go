package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/cc-runtime/cvm-agent/agent/control"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// ctl holds what all control commands share.
type ctl struct {
	socket string
	output string
}

func (c *ctl) client() *control.Client { return control.NewClient(c.socket) }

func ctlCommand() *cobra.Command {
	c := &ctl{}
	cmd := &cobra.Command{
		Use:   "ctl",
		Short: "Ask or order the agent of this guest",
		Long: "Ask or order the agent of this guest through its control socket. Orders need root, or the socket's group;\n" +
			"their exit status is the outcome's, see `cvm-agent --help`.",
		Example: "  cvm-agent ctl status --output json\n" +
			"  cvm-agent ctl events --follow\n" +
			"  cvm-agent ctl upgrade policy.dsse.json",
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cause.New(cause.Usage, "%s needs a command, see `%s --help`", cmd.CommandPath(), cmd.CommandPath())
		},
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if c.output != "text" && c.output != "json" {
				return cause.New(cause.Usage, "--output is %q, expected text or json", c.output)
			}
			return nil
		},
	}
	cmd.PersistentFlags().StringVar(&c.socket, "socket", "/run/cvm-agent/control.sock", "the agent's control socket `PATH`")
	cmd.PersistentFlags().StringVarP(&c.output, "output", "o", "text", "`FORMAT` of the output: text or json")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	cmd.AddCommand(c.status(), c.events(), c.upgrade(), c.destroy())
	return cmd
}

func (c *ctl) status() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show the agent's state, its workloads and every phase", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := c.client().Status(cmd.Context())
			if err != nil {
				return err
			}
			if c.output == "json" {
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				return enc.Encode(st)
			}
			return printStatus(cmd.OutOrStdout(), st)
		},
	}
}

func printStatus(out io.Writer, st *control.Status) error {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintf(w, "state\t%s\n", st.State)
	if st.Cause != "" {
		label := "cause"
		if st.State == control.StateReady {
			label = "last order" // it failed, and what ran before still runs
		}
		fmt.Fprintf(w, "%s\t%s: %s\n", label, st.Cause, st.Text)
	}
	if p := st.Policy; p != nil {
		fmt.Fprintf(w, "policy\t%s version %d, expires %s\n", p.Name, p.Version, p.Expires)
		fmt.Fprintf(w, "digest\t%s\n", p.Digest)
	}
	if st.Platform != "" {
		fmt.Fprintf(w, "platform\t%s\n", st.Platform)
	}
	if b := st.Broker; b != nil {
		fmt.Fprintf(w, "broker\t%s\n", b.URL)
	}
	if l := st.EventLog; l != nil {
		fmt.Fprintf(w, "event log\t%d events in %s\n", l.Events, l.Register)
	}
	if len(st.Workloads) > 0 {
		fmt.Fprint(w, "\nWORKLOAD\tHEALTHY\tIMAGE\n")
		for _, l := range st.Workloads {
			healthy := "yes"
			if !l.Healthy {
				healthy = strings.TrimSuffix("no: "+l.Text, ": ")
			}
			fmt.Fprintf(w, "%s\t%s\t%s\n", l.Name, healthy, l.Image)
		}
	}
	if len(st.Phases) > 0 {
		fmt.Fprint(w, "\nSEQUENCE\tPHASE\tWORKLOAD\tOUTCOME\tDURATION\tDETAIL\n")
		for _, p := range st.Phases {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", p.Sequence, p.Name, dash(p.Workload), p.Outcome, duration(p.DurationMS), detail(p))
		}
	}
	return w.Flush()
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func detail(p control.Phase) string {
	if p.Cause != "" {
		return p.Cause + ": " + p.Text
	}
	return p.Text
}

func duration(ms float64) string {
	d := time.Duration(ms * float64(time.Millisecond))
	switch {
	case d >= 10*time.Second:
		return d.Round(time.Second).String()
	case d >= time.Second:
		return d.Round(10 * time.Millisecond).String()
	}
	return d.Round(100 * time.Microsecond).String()
}

func (c *ctl) events() *cobra.Command {
	follow := false
	cmd := &cobra.Command{
		Use: "events", Short: "Show what happened, one line for each change of a phase", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.client().Events(cmd.Context(), follow, func(e control.Event) error { return c.event(cmd.OutOrStdout(), e) })
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with the events to come")
	return cmd
}

func (c *ctl) event(out io.Writer, e control.Event) error {
	if c.output == "json" {
		return json.NewEncoder(out).Encode(e)
	}
	at := e.Name
	if e.Workload != "" {
		at += "/" + e.Workload
	}
	line := fmt.Sprintf("%s  %-8s  %-24s  %-7s", e.Time.Local().Format("15:04:05.000"), e.Sequence, at, e.Outcome)
	if e.Outcome != control.Running && e.Outcome != control.Waiting {
		line += fmt.Sprintf("  %8s", duration(e.DurationMS))
	}
	if d := detail(e.Phase); d != "" {
		line += "  " + d
	}
	_, err := fmt.Fprintln(out, line)
	return err
}

func (c *ctl) upgrade() *cobra.Command {
	return &cobra.Command{
		Use:   "upgrade POLICY",
		Short: "Replace the running policy by a newer one",
		Long: "Replace the running policy by a newer one: POLICY is a file with an initdata document or a DSSE envelope,\n" +
			"- for standard input. The new version is verified and fetched while the old one runs; when it does not become\n" +
			"healthy the old one runs again, and the exit status says so.",
		Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			order, err := readOrder(cmd.InOrStdin(), args[0])
			if err != nil {
				return err
			}
			err = c.client().Upgrade(cmd.Context(), order, func(e control.Event) { _ = c.event(cmd.OutOrStdout(), e) })
			var e *cause.Error
			if errors.As(err, &e) && e.Code == cause.InitdataMalformed && (strings.HasSuffix(args[0], ".yaml") || strings.HasSuffix(args[0], ".yml")) {
				err = cause.New(e.Code, "%w (a policy in YAML is signed first: cvmctl policy sign)", e.Err)
			}
			return c.outcome(cmd.OutOrStdout(), "upgrade", err)
		},
	}
}

func readOrder(stdin io.Reader, path string) (order []byte, err error) {
	if path == "-" {
		order, err = bounded.ReadAll(stdin, control.MaxOrder)
	} else {
		order, err = bounded.ReadFile(path, control.MaxOrder)
	}
	switch {
	case errors.Is(err, bounded.ErrTooLarge):
		return nil, cause.New(cause.PolicyTooLarge, "%w", err)
	case err != nil:
		return nil, cause.New(cause.Usage, "%w", err)
	}
	return order, nil
}

func (c *ctl) destroy() *cobra.Command {
	yes := false
	cmd := &cobra.Command{
		Use:   "destroy",
		Short: "End this instance: remove its workloads, images, volumes and keys",
		Args:  usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !yes {
				if err := confirm(cmd.InOrStdin(), cmd.ErrOrStderr()); err != nil {
					return err
				}
			}
			err := c.client().Destroy(cmd.Context(), func(e control.Event) { _ = c.event(cmd.OutOrStdout(), e) })
			return c.outcome(cmd.OutOrStdout(), "destroy", err)
		},
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

func confirm(stdin io.Reader, stderr io.Writer) error {
	f, ok := stdin.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return cause.New(cause.Usage, "destroy cannot be undone: say --yes")
	}
	fmt.Fprint(stderr, "This removes all workloads, images, volumes and keys of this instance for ever. Type destroy to go on: ")
	line, err := bufio.NewReader(io.LimitReader(f, 64)).ReadString('\n')
	if err != nil || strings.TrimSpace(line) != "destroy" {
		return cause.New(cause.Usage, "not confirmed, nothing was done")
	}
	return nil
}

// outcome prints the last line of an order.
func (c *ctl) outcome(out io.Writer, order string, err error) error {
	if c.output == "json" {
		result := control.Result{Outcome: control.OK}
		if err != nil {
			result = control.Result{Outcome: control.Failed, Cause: string(cause.Of(err)), Text: err.Error()}
		}
		if encodeErr := json.NewEncoder(out).Encode(control.Line{Result: &result}); encodeErr != nil && err == nil {
			return encodeErr
		}
	} else if err == nil {
		fmt.Fprintf(out, "%s: ok\n", order)
	}
	return err
}
