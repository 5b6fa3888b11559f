// Package usagetest holds the command tree of a program to the wording of
// package usage. No program imports it.
package usagetest

import (
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Groups asks every command of the tree that has others for one that it has not,
// and for none, and returns the names of all of them. make makes the tree.
func Groups(t *testing.T, make func() *cobra.Command) (groups []string) {
	t.Helper()
	root := make()
	root.InitDefaultHelpCmd() // what cobra adds as it runs
	root.InitDefaultCompletionCmd()
	run := func(args ...string) error {
		c := make()
		c.SetArgs(args)
		c.SetOut(io.Discard)
		c.SetErr(io.Discard)
		return c.ExecuteContext(t.Context())
	}
	is := func(want string, args ...string) {
		t.Helper()
		err := run(args...)
		if err == nil {
			t.Errorf("%s %s: no error, expected %q", root.Name(), strings.Join(args, " "), want)
			return
		}
		if err.Error() != "usage: "+want || cause.Exit(err) != cause.ExitUsage {
			t.Errorf("%s %s: exit status %d, %q, expected %d, %q", root.Name(), strings.Join(args, " "), cause.Exit(err), err, cause.ExitUsage, "usage: "+want)
		}
	}
	var walk func(c *cobra.Command, path []string)
	walk = func(c *cobra.Command, path []string) {
		at := func(more ...string) []string { return append(append([]string{}, path...), more...) }
		if !c.HasSubCommands() {
			return
		}
		groups = append(groups, c.CommandPath())
		unknown := fmt.Sprintf("unknown command \"nonsense\" after %q, see %s --help", c.CommandPath(), c.CommandPath())
		is(unknown, at("nonsense")...)
		is(unknown, at("nonsense", "snp", "--frobnicate", "x")...) // the meant command may have that flag
		is(unknown, append([]string{"help"}, at("nonsense")...)...)
		if c.Use == c.Name() && c.HasParent() { // it does nothing by itself
			is(fmt.Sprintf("expected a command after %q, see %s --help", c.CommandPath(), c.CommandPath()), path...)
		}
		for _, sub := range c.Commands() {
			if name := sub.Name(); sub.IsAvailableCommand() {
				err := run(at(name + "x")...)
				if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("unknown command %q after %q (nearest: ", name+"x", c.CommandPath())) || !strings.Contains(err.Error(), name) {
					t.Errorf("%s %sx: %v, expected the nearest, %s", c.CommandPath(), name, err, name)
				}
			}
			walk(sub, at(sub.Name()))
		}
	}
	walk(root, nil)
	return groups
}
