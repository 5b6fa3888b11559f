package fault

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// Each refusal of a launch is one script in testdata/refusal; the README there
// lists the commands. Scripts run side by side, each on a place of its own: a
// guest with its TPM, its podman, its way to the registry and to the broker.

func TestMain(m *testing.M) {
	flag.Parse()
	// Scripts wait more than they compute.
	if err := flag.Set("test.parallel", fmt.Sprint(places+1)); err != nil {
		fmt.Fprintln(os.Stderr, "fault:", err)
		os.Exit(1)
	}
	status := m.Run()
	if err := closeScene(); err != nil {
		fmt.Fprintln(os.Stderr, "fault:", err)
		status = 1
	}
	os.Exit(status)
}

// TestRefusals runs every script that is not a lesson's.
func TestRefusals(t *testing.T) {
	t.Parallel()
	all, err := filepath.Glob("testdata/refusal/*.txtar")
	if err != nil || len(all) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	var files []string
	for _, f := range all {
		if !strings.HasPrefix(filepath.Base(f), "lesson") {
			files = append(files, f)
		}
	}
	script(t, files...)
}

func TestLesson05_AnUnboundLaunchIsRefused(t *testing.T) { t.Parallel(); lesson(t, "05") }

func TestLesson16_ATamperedCacheIsRefused(t *testing.T) { t.Parallel(); lesson(t, "16") }

func TestLesson17_EachWorkloadRunsItsOwnImage(t *testing.T) { t.Parallel(); lesson(t, "17") }

func TestLesson20_ABlipIsWaitedFor(t *testing.T) { t.Parallel(); lesson(t, "20") }

func TestLesson21_AFullDiskIsNamed(t *testing.T) { t.Parallel(); lesson(t, "21") }

func TestLesson24_NothingButRegistryAndBroker(t *testing.T) { t.Parallel(); lesson(t, "24") }

func TestLesson29_NoKeyInSight(t *testing.T) { t.Parallel(); lesson(t, "29") }

// lesson runs the scripts of one row of the lessons.
func lesson(t *testing.T, row string) {
	files, err := filepath.Glob("testdata/refusal/lesson" + row + "-*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no script for lesson %s: %v", row, err)
	}
	script(t, files...)
}

func script(t *testing.T, files ...string) {
	s, err := theScene()
	if err != nil {
		t.Fatalf("the scene cannot be set (`make deps build` first): %v", err)
	}
	testscript.Run(t, testscript.Params{
		Files: files, Setup: s.setup, Cmds: commands, RequireUniqueNames: true, RequireExplicitExec: true,
	})
}

// The scene is set by the first script and taken down at the end.
var (
	setScene sync.Once
	current  *scene
	sceneErr error
)

func theScene() (*scene, error) {
	setScene.Do(func() { current, sceneErr = newScene(context.Background()) })
	return current, sceneErr
}

func closeScene() error {
	if current == nil {
		return nil
	}
	return current.rig.Close()
}
