package main

import (
	"context"
	"log/slog"
	"slices"
	"strings"

	"github.com/coreos/go-systemd/v22/journal"
)

// journalHandler is a slog.Handler that keeps attributes as journal fields, so
// that `journalctl CVM_PHASE=fetch` works.
type journalHandler struct {
	attrs  []slog.Attr
	prefix string // of the open groups, as PREFIX_
}

// Enabled implements slog.Handler.
func (*journalHandler) Enabled(_ context.Context, level slog.Level) bool {
	return level >= slog.LevelInfo
}

// Handle implements slog.Handler.
func (h *journalHandler) Handle(_ context.Context, r slog.Record) error {
	fields := map[string]string{}
	add := func(a slog.Attr) bool {
		fields[h.field(a.Key)] = a.Value.Resolve().String()
		return true
	}
	for _, a := range h.attrs {
		add(a)
	}
	r.Attrs(add)
	return journal.Send(r.Message, priority(r.Level), fields)
}

// field makes a journal field name: upper case letters, digits, underscores.
func (h *journalHandler) field(key string) string {
	return "CVM_" + strings.Map(func(r rune) rune {
		switch {
		case r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			return r
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		}
		return '_'
	}, h.prefix+key)
}

func priority(l slog.Level) journal.Priority {
	switch {
	case l >= slog.LevelError:
		return journal.PriErr
	case l >= slog.LevelWarn:
		return journal.PriWarning
	}
	return journal.PriInfo
}

// WithAttrs implements slog.Handler.
func (h *journalHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &journalHandler{attrs: append(slices.Clone(h.attrs), attrs...), prefix: h.prefix}
}

// WithGroup implements slog.Handler.
func (h *journalHandler) WithGroup(name string) slog.Handler {
	return &journalHandler{attrs: h.attrs, prefix: h.prefix + name + "_"}
}
