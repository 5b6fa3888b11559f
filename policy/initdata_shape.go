package policy

import (
	"bytes"
	"fmt"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
)

// What initdata can need, outside strings and comments. The TOML library's time
// is quadratic in the number of keys (2 MiB of short ones keep it busy for
// minutes), it nests 10000 deep, and an array of 10⁶ numbers costs it 130 MB:
// all are bounded before it sees a byte.
const (
	maxTOMLPairs    = maxInitdataEntries + 2 // "=": version, algorithm and the entries of [data]
	maxTOMLBrackets = 16                     // "[" and "{": [data], or data = {…}
	maxTOMLDots     = 256                    // dotted keys, which only a refused document has many of
	maxTOMLCommas   = maxTOMLPairs           // between the entries of data = {…}

	maxInitdataEntries = 64
)

// checkShape counts what is outside strings and comments. Where it and the
// TOML grammar could disagree the document is not TOML, and the parser stops
// there: what it has read until then was counted.
func checkShape(raw []byte) error {
	pairs, brackets, dots, commas := 0, 0, 0, 0
	for i := 0; i < len(raw); {
		switch raw[i] {
		case '"', '\'':
			i = afterString(raw, i)
			continue
		case '#':
			if n := bytes.IndexByte(raw[i:], '\n'); n >= 0 {
				i += n
			} else {
				i = len(raw)
			}
			continue
		case '=':
			pairs++
		case '[', '{':
			brackets++
		case '.':
			dots++
		case ',':
			commas++
		}
		i++
	}
	switch {
	case pairs > maxTOMLPairs:
		return fmt.Errorf("%d entries, at most %d are accepted: %w", pairs, maxTOMLPairs, bounded.ErrTooLarge)
	case commas > maxTOMLCommas:
		return fmt.Errorf("lists of %d members, at most %d are accepted: %w", commas+1, maxTOMLCommas, bounded.ErrTooLarge)
	case brackets > maxTOMLBrackets || dots > maxTOMLDots:
		return fmt.Errorf("%d tables and arrays and %d dots, expected [data] and no more: %w", brackets, dots, bounded.ErrDepth)
	}
	return nil
}

// afterString returns the offset after the TOML string that begins at i: basic
// or literal, on one line or, with three quotes, on several.
func afterString(raw []byte, i int) int {
	q := raw[i]
	three := []byte{q, q, q}
	if !bytes.HasPrefix(raw[i:], three) {
		for i++; i < len(raw) && raw[i] != q && raw[i] != '\n'; i++ {
			if q == '"' && raw[i] == '\\' {
				i++
			}
		}
		return min(i+1, len(raw))
	}
	for i += 3; i < len(raw); i++ {
		if q == '"' && raw[i] == '\\' {
			i++
			continue
		}
		if !bytes.HasPrefix(raw[i:], three) {
			continue
		}
		// One or two more quotes belong to the string: its last three end it.
		for n := 0; n < 2 && i+3 < len(raw) && raw[i+3] == q; n++ {
			i++
		}
		return i + 3
	}
	return len(raw)
}
