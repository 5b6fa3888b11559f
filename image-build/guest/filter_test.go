//go:build image

package guest

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

// TestTheNetworkReachesPublishedPortsAlone: with the image's own netavark, nft and
// rules, in network namespaces: a host that routes to a container, or that
// routes a container's address to itself, gets nothing.
func TestTheNetworkReachesPublishedPortsAlone(t *testing.T) {
	cmd := exec.Command("unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "sh", "testdata/filter.sh", root(t))
	cmd.Env = append(os.Environ(), "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	got := regexp.MustCompile(`(?m)^try (.*)$`).FindAllStringSubmatch(string(out), -1)
	var lines []string
	for _, m := range got {
		lines = append(lines, m[1])
	}
	equal(t, "what is reached", lines, []string{
		"open, unpublished by route: port 9999", "open, agent asks the container: port 9999", "open, agent's route is the host's: the host",
		"fenced, published: port 8080", "fenced, agent asks the container: port 9999", "fenced, container asks the host: the host",
		"fenced, unpublished by route: nothing", "fenced, published port by route: nothing", "fenced, agent's route is the host's: nothing",
	})
	if t.Failed() {
		t.Logf("%s", out)
	}
	if !strings.Contains(read(t, root(t, "usr/lib/systemd/system/cvm-agent.service.d/image.conf")), "\nRequires=cvm-filter.service\nAfter=cvm-filter.service\n") {
		t.Error("the agent does not wait for the filter")
	}
	config := read(t, root(t, "etc/containers/containers.conf"))
	if !strings.Contains(config, "\ndefault_subnet = \"10.88.0.0/16\"\n") || !strings.Contains(config, "\ndefault_network = \"podman\"\n") {
		t.Error("containers.conf does not pin the network that filter.nft fences")
	}
}
