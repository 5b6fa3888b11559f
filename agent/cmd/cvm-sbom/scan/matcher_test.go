package scan

import (
	"context"
	"io"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/anchore/syft/syft"
	"github.com/anchore/syft/syft/cataloging"
	"github.com/anchore/syft/syft/file"
	"github.com/anchore/syft/syft/pkg"
)

func TestALateMatcherFindsWhatSyftsOwnFinds(t *testing.T) {
	cfg := cataloging.DefaultLicenseConfig()
	own, err := syft.SetContextLicenseScanner(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	late, build, err := lateMatcher(context.Background(), cfg.Coverage)
	if err != nil {
		t.Fatal(err)
	}
	defer build()
	licence, err := os.ReadFile("../../../../LICENSE") // the project's own
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{string(licence), "no licence", string(licence) + strings.Repeat("other words ", 200), ""} {
		find := func(ctx context.Context) []pkg.License {
			return pkg.NewLicensesFromReadCloserWithContext(ctx, file.NewLocationReadCloser(file.NewLocation("/LICENSE"), io.NopCloser(strings.NewReader(text))))
		}
		if got, want := find(late), find(own); !reflect.DeepEqual(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
	}
	if got := pkg.NewLicensesFromReadCloserWithContext(late, file.NewLocationReadCloser(file.NewLocation("/LICENSE"), io.NopCloser(strings.NewReader(string(licence))))); len(got) != 1 || got[0].SPDXExpression != "Apache-2.0" {
		t.Errorf("got %v", got)
	}
}
