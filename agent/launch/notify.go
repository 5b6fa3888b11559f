package launch

import (
	"context"
	"log/slog"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/coreos/go-systemd/v22/dbus"

	"github.com/cc-runtime/cvm-agent/agent/control"
)

// manager is the service manager.
type manager interface {
	notify(state string)
	powerOff(ctx context.Context) error
}

// systemd is told over NOTIFY_SOCKET; without one nothing happens.
type systemd struct{}

func (systemd) notify(state string) { _, _ = daemon.SdNotify(false, state) }

// powerOff asks systemd itself, over its private socket: no bus needs to run.
func (systemd) powerOff(ctx context.Context) error {
	conn, err := dbus.NewSystemdConnectionContext(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.StartUnitContext(ctx, "poweroff.target", "replace-irreversibly", nil)
	return err
}

// LogKey is the attribute that a workload's own words are in: for the journal,
// and for no logger whose output may be the console.
const LogKey = "log"

// notice writes each event to the journal and to STATUS=.
func (a *Agent) notice(e control.Event) {
	at := e.Sequence + ": " + e.Name
	if e.Workload != "" {
		at += "/" + e.Workload
	}
	text := at + " " + e.Outcome
	if e.Text != "" {
		text += ": " + e.Text
	}
	a.manager.notify("STATUS=" + text)

	attrs := []slog.Attr{slog.String("sequence", e.Sequence), slog.String("phase", e.Name), slog.String("outcome", e.Outcome)}
	if e.Workload != "" {
		attrs = append(attrs, slog.String("workload", e.Workload))
	}
	if e.Cause != "" {
		attrs = append(attrs, slog.String("cause", e.Cause))
	}
	if e.Text != "" {
		attrs = append(attrs, slog.String("text", e.Text))
	}
	if e.Log != "" {
		attrs = append(attrs, slog.String(LogKey, e.Log))
	}
	level := slog.LevelInfo
	switch e.Outcome {
	case control.Running:
		level = slog.LevelDebug
	case control.Failed:
		level = slog.LevelError
	case control.Waiting:
		level = slog.LevelWarn
	}
	if e.Outcome != control.Running && e.Outcome != control.Waiting {
		attrs = append(attrs, slog.Float64("ms", e.DurationMS))
	}
	a.logger.LogAttrs(context.Background(), level, at+" "+e.Outcome, attrs...)
}

// watchdog tells the manager that the agent is alive: that its locks can be
// taken, not merely that a timer fires.
func (a *Agent) watchdog(ctx context.Context) {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil || interval == 0 {
		return
	}
	ticker := time.NewTicker(interval / 3)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			_ = a.Status()
			a.manager.notify("WATCHDOG=1")
		}
	}
}
