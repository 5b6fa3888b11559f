package usage

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/usage/usagetest"
)

// tree has every kind of command there is.
func tree() *cobra.Command {
	nothing := func(*cobra.Command, []string) error { return nil }
	root := &cobra.Command{Use: "prog", SilenceErrors: true, SilenceUsage: true, RunE: nothing}
	group := &cobra.Command{Use: "group", Short: "a group", PersistentPreRunE: func(*cobra.Command, []string) error { return errors.New("a flag is missing") }}
	group.PersistentFlags().String("url", "", "")
	both := &cobra.Command{Use: "both --in FILE", Args: cobra.NoArgs, RunE: nothing}
	both.AddCommand(&cobra.Command{Use: "check FILE", Args: cobra.ExactArgs(1), RunE: nothing})
	deep := &cobra.Command{Use: "deep"}
	leaf := &cobra.Command{Use: "leaf", Args: cobra.NoArgs, RunE: nothing}
	leaf.Flags().String("in", "", "")
	deep.AddCommand(leaf)
	group.AddCommand(deep, &cobra.Command{Use: "own", RunE: nothing, Args: func(*cobra.Command, []string) error { return cause.New(cause.PolicyMissing, "its own") }})
	root.AddCommand(group, both, &cobra.Command{Use: "any", RunE: nothing})
	Errors(root)
	return root
}

func TestGroups(t *testing.T) {
	groups := usagetest.Groups(t, tree)
	if want := "prog, prog both, prog completion, prog group, prog group deep"; strings.Join(groups, ", ") != want {
		t.Errorf("asked %q, expected %s", groups, want)
	}
}

func TestErrors(t *testing.T) {
	for line, want := range map[string]string{
		"":                          "",
		"any a b":                   "",
		"both":                      "",
		"both --in":                 "usage: unknown flag: --in, see prog both --help",
		"group":                     `usage: expected a command after "prog group", see prog group --help`,
		"group --url x":             `usage: expected a command after "prog group", see prog group --help`,
		"group --url x nonsense":    `usage: unknown command "nonsense" after "prog group", see prog group --help`,
		"group nonsense --in x":     `usage: unknown command "nonsense" after "prog group", see prog group --help`,
		"group --in x nonsense":     `usage: unknown flag: --in, see prog group --help`,
		"group own":                 "policy-missing: its own",
		"group deep lea":            `usage: unknown command "lea" after "prog group deep" (nearest: leaf), see prog group deep --help`,
		"group deep -- nonsense":    `usage: unknown command "nonsense" after "prog group deep", see prog group deep --help`,
		"group deep leaf x y":       `usage: unexpected argument "x", see prog group deep leaf --help`,
		"group deep leaf --in":      "usage: flag needs an argument: --in, see prog group deep leaf --help",
		"both check":                "usage: accepts 1 arg(s), received 0, see prog both check --help",
		"both check a b":            "usage: accepts 1 arg(s), received 2, see prog both check --help",
		"help both nonsense":        `usage: unknown command "nonsense" after "prog both", see prog both --help`,
		"help any nonsense":         `usage: unknown command "nonsense" after "prog any", see prog any --help`,
		"help group deep leaf":      "",
		"completion nonsense --any": `usage: unknown command "nonsense" after "prog completion", see prog completion --help`,
		"group nonsense --help":     "",
	} {
		c := tree()
		var out bytes.Buffer
		c.SetOut(&out)
		c.SetArgs(strings.Fields(line))
		err := c.Execute()
		switch got := ""; {
		case err != nil:
			if got = err.Error(); got != want {
				t.Errorf("%q: %q, expected %q", line, got, want)
			}
			if out.Len() > 0 {
				t.Errorf("%q: prints %q beside its error", line, out.String())
			}
		case want != "":
			t.Errorf("%q: no error, expected %q", line, want)
		case strings.Contains(line, "help") != strings.Contains(out.String(), "Usage:"):
			t.Errorf("%q: %q", line, out.String())
		}
	}
}
