package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/cc-runtime/cvm-agent/agent/control"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/order"
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
	cmd.AddCommand(c.status(), c.events(), c.challenge(), c.upgrade(), c.destroy())
	return cmd
}

func (c *ctl) status() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show the agent's state, its workloads and every phase", Args: cobra.NoArgs,
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
			return st.Print(cmd.OutOrStdout())
		},
	}
}

func (c *ctl) events() *cobra.Command {
	follow := false
	cmd := &cobra.Command{
		Use: "events", Short: "Show what happened, one line for each change of a phase", Args: cobra.NoArgs,
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
	return e.Print(out)
}

func (c *ctl) challenge() *cobra.Command {
	return &cobra.Command{
		Use: "challenge", Short: "Ask for a challenge that a signed order has to answer", Args: cobra.NoArgs,
		Long: "Ask for a challenge that a signed order has to answer: JSON, which `cvmctl order` reads. It is good for one\n" +
			"order, for ten minutes.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			ch, err := c.client().Challenge(cmd.Context())
			if err != nil {
				return err
			}
			return control.PrintJSON(cmd.OutOrStdout(), ch)
		},
	}
}

func (c *ctl) upgrade() *cobra.Command {
	signed := ""
	cmd := &cobra.Command{
		Use:   "upgrade POLICY | --order FILE",
		Short: "Replace the running policy by a newer one",
		Long: "Replace the running policy by a newer one: POLICY is a file with an initdata document or a DSSE envelope,\n" +
			"- for standard input. The new version is verified and fetched while the old one runs; when it does not become\n" +
			"healthy the old one runs again, and the exit status says so. A signed order, made with `cvmctl order upgrade`,\n" +
			"carries its policy.",
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			each := func(e control.Event) { _ = c.event(cmd.OutOrStdout(), e) }
			if (signed == "") == (len(args) == 0) {
				return cause.New(cause.Usage, "expected either a policy or --order, see %s --help", cmd.CommandPath())
			}
			if signed != "" {
				return c.signed(cmd, order.Upgrade, signed)
			}
			document, err := readOrder(cmd.InOrStdin(), args[0])
			if err != nil {
				return err
			}
			err = c.client().Upgrade(cmd.Context(), document, each)
			var e *cause.Error
			if errors.As(err, &e) && e.Code == cause.InitdataMalformed && (strings.HasSuffix(args[0], ".yaml") || strings.HasSuffix(args[0], ".yml")) {
				err = cause.New(e.Code, "%w (a policy in YAML is signed first: cvmctl policy sign)", e.Err)
			}
			return c.outcome(cmd.OutOrStdout(), "upgrade", err)
		},
	}
	cmd.Flags().StringVar(&signed, "order", "", "signed order `FILE`, - for standard input")
	return cmd
}

// signed sends a signed order, if it is one for the operation.
func (c *ctl) signed(cmd *cobra.Command, operation, path string) error {
	document, err := readOrder(cmd.InOrStdin(), path)
	if err != nil {
		return err
	}
	d, err := order.Parse(document)
	if err != nil {
		return err
	}
	o, err := d.Peek()
	if err != nil {
		return err
	}
	if o.Operation != operation {
		return cause.New(cause.OrderOperation, "%s is an order to %s, expected one to %s", path, o.Operation, operation)
	}
	err = c.client().Signed(cmd.Context(), document, func(e control.Event) { _ = c.event(cmd.OutOrStdout(), e) })
	return c.outcome(cmd.OutOrStdout(), operation, err)
}

func readOrder(stdin io.Reader, path string) (document []byte, err error) {
	if path == "-" {
		document, err = bounded.ReadAll(stdin, control.MaxOrder)
	} else {
		document, err = bounded.ReadNamed(path, control.MaxOrder)
	}
	switch {
	case errors.Is(err, bounded.ErrTooLarge):
		return nil, cause.New(cause.PolicyTooLarge, "%w", err)
	case err != nil:
		return nil, cause.New(cause.Usage, "%w", err)
	}
	return document, nil
}

func (c *ctl) destroy() *cobra.Command {
	yes, signed := false, ""
	cmd := &cobra.Command{
		Use:   "destroy [--yes | --order FILE]",
		Short: "End this instance: remove its workloads, images, volumes and keys",
		Long: "End this instance for ever: remove its workloads, images, volumes and keys. It asks first, unless told --yes or\n" +
			"given a signed order, made with `cvmctl order destroy`.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if signed != "" {
				return c.signed(cmd, order.Destroy, signed)
			}
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
	cmd.Flags().StringVar(&signed, "order", "", "signed order `FILE`, - for standard input")
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
func (c *ctl) outcome(out io.Writer, operation string, err error) error {
	if c.output == "json" {
		result := control.Result{Outcome: control.OK}
		if err != nil {
			result = control.Result{Outcome: control.Failed, Cause: string(cause.Of(err)), Text: err.Error()}
		}
		if encodeErr := json.NewEncoder(out).Encode(control.Line{Result: &result}); encodeErr != nil && err == nil {
			return encodeErr
		}
	} else if err == nil {
		fmt.Fprintf(out, "%s: ok\n", operation)
	}
	return err
}
