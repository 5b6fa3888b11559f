// Package usage gives the command lines of this project's programs one voice:
// whatever is wrong with the words of one is an error with the code for usage, in
// one wording, and names the help to read. It judges words alone, not what flags
// hold; that stays with the command.
package usage

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Errors gives every command of the tree these errors, in place of cobra's. It is
// called on a root that has all its commands; `help` and `completion`, which
// cobra would add later, are made here so that they are no exception.
//
// A command with subcommands takes no arguments of its own: what comes after it
// is a command, and an unknown one is said to be before anything else is looked
// at, a flag that only the meant command has among it. One without a Run expects
// a command. --help is answered, whatever else is there.
func Errors(root *cobra.Command) {
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		if c.Name() == "help" {
			c.Args, c.Run, c.RunE = cobra.ArbitraryArgs, nil, help
		}
	}
	errorsOf(root)
}

func errorsOf(c *cobra.Command) {
	for _, sub := range c.Commands() {
		errorsOf(sub)
	}
	c.SetFlagErrorFunc(flagError)
	if !c.HasSubCommands() {
		c.Args = leaf(c.Args)
		return
	}
	runs := c.Runnable()
	c.Args = func(c *cobra.Command, args []string) error {
		switch {
		case len(args) > 0:
			return Unknown(c, args[0])
		case !runs:
			return see(c, "expected a command after %q", c.CommandPath())
		}
		return nil
	}
	if !runs {
		c.RunE = func(c *cobra.Command, _ []string) error { return c.Args(c, nil) } // cobra asks the Args of what can run alone
	}
}

// Unknown is the error of a word after c that is none of its commands; it has the
// nearest ones.
func Unknown(c *cobra.Command, word string) error {
	near := ""
	if c.SuggestionsMinimumDistance <= 0 {
		c.SuggestionsMinimumDistance = 2 // as cobra has it
	}
	if names := c.SuggestionsFor(word); word != "" && len(names) > 0 {
		near = " (nearest: " + strings.Join(names, ", ") + ")"
	}
	return see(c, "unknown command %q after %q%s", word, c.CommandPath(), near)
}

// see is an error of usage that names the help to read.
func see(c *cobra.Command, format string, args ...any) error {
	return cause.New(cause.Usage, "%w, see %s --help", fmt.Errorf(format, args...), c.CommandPath())
}

func flagError(c *cobra.Command, err error) error {
	// What was parsed before the flag.
	if args := c.Flags().Args(); c.HasSubCommands() && len(args) > 0 {
		return Unknown(c, args[0])
	}
	return see(c, "%w", err)
}

// leaf is check, whose errors have the code; nil accepts anything, as in cobra.
func leaf(check cobra.PositionalArgs) cobra.PositionalArgs {
	if check == nil {
		return nil
	}
	return func(c *cobra.Command, args []string) error {
		err := check(c, args)
		switch {
		case err == nil:
			return nil
		case len(args) > 0 && check(c, nil) == nil && check(c, args[:1]) != nil:
			// It takes none. cobra calls this an unknown command.
			return see(c, "unexpected argument %q", args[0])
		case cause.Of(err) != cause.Internal:
			return err
		}
		return see(c, "%w", err)
	}
}

// help is cobra's, but for what it says of an unknown command.
func help(c *cobra.Command, args []string) error {
	of, rest, err := c.Root().Find(args)
	if err != nil {
		return see(c, "%w", err)
	}
	if len(rest) > 0 {
		return Unknown(of, rest[0])
	}
	of.InitDefaultHelpFlag()
	of.InitDefaultVersionFlag()
	return of.Help()
}
