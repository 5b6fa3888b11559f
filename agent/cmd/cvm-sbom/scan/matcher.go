package scan

import (
	"context"
	"sync"
	_ "unsafe" // for linkname

	"github.com/google/licensecheck"
)

// syft builds its licence matcher before anything else: a second of a core, and
// many images have no text to match. Its package that would take another one is
// internal, so two of its functions are reached by name. A syft without them
// does not link; TestALateMatcherFindsWhatSyftsOwnFinds holds the rest.

// scannerConfig is syft's licenses.ScannerConfig.
type scannerConfig struct {
	CoverageThreshold float64
	Scanner           func([]byte) licensecheck.Coverage
}

// matcher is syft's licenses.Scanner: handed through, never called here.
type matcher interface{ handedThrough() }

//go:linkname newMatcher github.com/anchore/syft/internal/licenses.NewScanner
func newMatcher(*scannerConfig) (matcher, error)

//go:linkname withMatcher github.com/anchore/syft/internal/licenses.SetContextLicenseScanner
func withMatcher(context.Context, matcher) context.Context

// lateMatcher gives ctx a matcher like syft's own that is built by whoever
// first needs it, build or the scan, whichever comes first.
func lateMatcher(ctx context.Context, coverage float64) (_ context.Context, build func(), err error) {
	built := sync.OnceValue(func() *licensecheck.Scanner {
		s, err := licensecheck.NewScanner(licensecheck.BuiltinLicenses())
		if err != nil {
			panic(err) // the licences are part of the library
		}
		return s
	})
	m, err := newMatcher(&scannerConfig{CoverageThreshold: coverage, Scanner: func(text []byte) licensecheck.Coverage { return built().Scan(text) }})
	if err != nil {
		return nil, nil, err
	}
	return withMatcher(ctx, m), func() { built() }, nil
}
