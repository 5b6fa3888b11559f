package policy

import (
	"encoding/json"
	"fmt"
	"time"
)

// Duration is a time span written as Go writes it ("90s", "5m").
type Duration time.Duration

// Or returns d, or def when d is zero.
func (d Duration) Or(def time.Duration) time.Duration {
	if d == 0 {
		return def
	}
	return time.Duration(d)
}

// MarshalJSON writes the duration as a string.
func (d Duration) MarshalJSON() ([]byte, error) {
	return json.Marshal(time.Duration(d).String())
}

// UnmarshalJSON reads a positive duration of at most 24 hours.
func (d *Duration) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	v, err := time.ParseDuration(s)
	if err != nil {
		return err
	}
	if v <= 0 || v > 24*time.Hour {
		return fmt.Errorf("duration %q is outside 0–24h", s)
	}
	*d = Duration(v)
	return nil
}
