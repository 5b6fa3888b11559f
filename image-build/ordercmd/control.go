package ordercmd

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/agent/control"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/order"
)

// remote is a guest's agent, as the host reaches it.
type remote struct {
	serial, output string
	wait           time.Duration
}

func (r *remote) client() *control.Client { return control.NewSerialClient(r.serial, r.wait) }

func controlCommand() *cobra.Command {
	r := &remote{}
	c := &cobra.Command{
		Use:   "control",
		Short: "Ask or order a guest's agent over its virtio-serial port, from the host",
		Long: "Ask or order a guest's agent over its virtio-serial port, from the host. PATH is the unix socket of QEMU's\n" +
			"-chardev socket,server=on,wait=off for the port org.cvm-agent.control, or a character device. The policy in\n" +
			"force must open the port (control.virtioSerial); orders need a signature, see `cvmctl order`. Orders end\n" +
			"with the exit status of their outcome. Answers are not signed: all that is read here is the host's word.",
		Example: "  cvmctl control --serial cvm.sock status\n" +
			"  cvmctl control --serial cvm.sock --wait 10m events --follow\n" +
			"  cvmctl control --serial cvm.sock order order.json",
		PersistentPreRunE: func(c *cobra.Command, _ []string) error {
			if r.serial == "" {
				return cause.New(cause.Usage, "%s: --serial is missing", c.CommandPath())
			}
			if r.wait <= 0 {
				return cause.New(cause.Usage, "--wait is %s, expected more than nothing", r.wait)
			}
			return checkFormat(r.output)
		},
	}
	c.PersistentFlags().StringVar(&r.serial, "serial", "", "the host's end of the port, a unix socket or device `PATH`")
	c.PersistentFlags().DurationVar(&r.wait, "wait", time.Minute, "`DURATION` until an answer has to begin; it includes the guest's boot")
	c.PersistentFlags().StringVarP(&r.output, "output", "o", "text", "`FORMAT` of the output: text or json")
	_ = c.RegisterFlagCompletionFunc("output", formats)
	c.AddCommand(r.status(), r.events(), r.challenge(), r.order())
	return c
}

func (r *remote) status() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show the agent's state, its workloads and every phase", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			st, err := r.client().Status(c.Context())
			if err != nil {
				return err
			}
			if r.output == "json" {
				e := json.NewEncoder(c.OutOrStdout())
				e.SetIndent("", "  ")
				return e.Encode(st)
			}
			return st.Print(c.OutOrStdout())
		},
	}
}

func (r *remote) events() *cobra.Command {
	follow := false
	c := &cobra.Command{
		Use: "events", Short: "Show what happened, one line for each change of a phase", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return r.client().Events(c.Context(), follow, func(e control.Event) error { return r.event(c, e) })
		},
	}
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on with the events to come; the next command on the port ends it")
	return c
}

func (r *remote) event(c *cobra.Command, e control.Event) error {
	if r.output == "json" {
		return control.PrintJSON(c.OutOrStdout(), e)
	}
	return e.Print(c.OutOrStdout())
}

func (r *remote) challenge() *cobra.Command {
	return &cobra.Command{
		Use: "challenge", Short: "Ask for a challenge that a signed order has to answer; JSON", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ch, err := r.client().Challenge(c.Context())
			if err != nil {
				return err
			}
			return control.PrintJSON(c.OutOrStdout(), ch)
		},
	}
}

func (r *remote) order() *cobra.Command {
	return &cobra.Command{
		Use: "order FILE", Short: "Send a signed order and wait for its outcome; - reads standard input", Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			document, err := read(c, args[0], order.MaxDocument, cause.OrderMalformed)
			if err != nil {
				return err
			}
			err = r.client().Signed(c.Context(), document, func(e control.Event) { _ = r.event(c, e) })
			if err == nil {
				fmt.Fprintln(c.ErrOrStderr(), hostsWord(document))
			}
			if r.output == "json" {
				result := control.Result{Outcome: control.OK}
				if err != nil {
					result = control.Result{Outcome: control.Failed, Cause: string(cause.Of(err)), Text: err.Error()}
				}
				if printErr := control.PrintJSON(c.OutOrStdout(), control.Line{Result: &result}); printErr != nil && err == nil {
					return printErr
				}
			} else if err == nil {
				fmt.Fprintln(c.OutOrStdout(), "ok")
			}
			return err
		},
	}
}

// hostsWord is what an operator has to know of an outcome that came by way of
// the host: it could have dropped the order and answered "ok" by itself. Of a
// destroy no record is made anywhere else, so a tombstone has to be set.
func hostsWord(document []byte) string {
	text := "cvmctl: this outcome is the host's word: nothing over the serial port is signed by the guest"
	d, err := order.Parse(document)
	if err != nil {
		return text
	}
	if o, err := d.Peek(); err == nil && o.Operation == order.Destroy && o.InstanceID != "" {
		text += "; that the broker releases nothing more to it takes `cvmctl broker instance tombstone " + o.InstanceID + "`"
	}
	return text
}
