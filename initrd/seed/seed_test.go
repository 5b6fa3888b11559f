package seed

import (
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

const agentSection = "cvm_agent:\n  initdata: |\n    version = \"0.1.0\"\n    algorithm = \"sha256\"\n    [data]\n"

func userData(more string) string { return "#cloud-config\n" + more + agentSection }

func network(more string) string {
	return "version: 2\nethernets:\n  eth0:\n    dhcp4: true\n" + more
}

func TestParseAccepts(t *testing.T) {
	s, err := Parse(Files{
		UserDataFile: []byte(userData("hostname: guest-1\nfqdn: guest-1.example.org\ntimezone: Europe/Berlin\nlocale: C.UTF-8\nntp:\n  servers: [192.0.2.1, time.example.org, \"2001:db8::1\"]\n")),
		MetaDataFile: []byte("instance-id: i-1\nlocal-hostname: guest-1\n"),
		NetworkConfigFile: []byte("network:\n  version: 2\n  ethernets:\n    lan:\n      match: {macaddress: \"52:54:00:12:34:56\"}\n      set-name: eth0\n" +
			"      dhcp6: false\n      addresses: [192.0.2.7/24]\n      gateway4: 192.0.2.1\n      mtu: 1400\n      optional: true\n" +
			"      routes:\n        - {to: default, via: 192.0.2.1, metric: 100}\n        - {to: 198.51.100.0/24, via: 192.0.2.2}\n" +
			"      nameservers: {addresses: [192.0.2.3], search: [example.org]}\n"),
	})
	if err != nil {
		t.Fatal(err)
	}
	if string(s.Initdata) != "version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n" {
		t.Fatalf("initdata %q", s.Initdata)
	}
	clean, err := s.Sanitized()
	if err != nil {
		t.Fatal(err)
	}
	text := string(clean[UserDataFile])
	if !strings.HasPrefix(text, "#cloud-config\n{") || strings.Contains(text, "cvm_agent") || strings.Contains(text, "algorithm") {
		t.Errorf("sanitised user-data:\n%s", text)
	}
	for name, want := range map[string]string{
		UserDataFile:      `{"hostname":"guest-1","fqdn":"guest-1.example.org","timezone":"Europe/Berlin","locale":"C.UTF-8","ntp":{"enabled":true,"servers":["192.0.2.1","time.example.org","2001:db8::1"]}}`,
		MetaDataFile:      `{"instance-id":"i-1","local-hostname":"guest-1"}`,
		NetworkConfigFile: `{"network":{"version":2,"ethernets":{"lan":{"match":{"macaddress":"52:54:00:12:34:56"},"set-name":"eth0","dhcp6":false,"addresses":["192.0.2.7/24"],"gateway4":"192.0.2.1","routes":[{"to":"default","via":"192.0.2.1","metric":100},{"to":"198.51.100.0/24","via":"192.0.2.2"}],"nameservers":{"addresses":["192.0.2.3"],"search":["example.org"]},"mtu":1400,"optional":true}}}}`,
	} {
		var got, expected any
		if err := yaml.Unmarshal(clean[name], &got); err != nil {
			t.Errorf("%s is not YAML: %v", name, err)
		}
		if err := yaml.Unmarshal([]byte(want), &expected); err != nil {
			t.Fatal(err)
		}
		g, _ := json.Marshal(got)
		e, _ := json.Marshal(expected)
		if string(g) != string(e) {
			t.Errorf("%s\n got %s\nwant %s", name, g, e)
		}
	}
}

func TestSanitizedOfTheLeast(t *testing.T) {
	s, err := Parse(Files{UserDataFile: []byte(userData("")), MetaDataFile: []byte("\n")})
	if err != nil {
		t.Fatal(err)
	}
	clean, err := s.Sanitized()
	if err != nil {
		t.Fatal(err)
	}
	if got := string(clean[UserDataFile]) + string(clean[MetaDataFile]); got != "#cloud-config\n{}\n{\n  \"instance-id\": \"cvm\"\n}\n" {
		t.Errorf("%q", got)
	}
	if _, there := clean[NetworkConfigFile]; there {
		t.Error("a network configuration out of nothing")
	}
}

// Lesson 1: each of these runs code as root, makes a user or writes a file. None
// reaches cloud-init, and the refusal names it.
func TestLesson01_WhatRunsCodeIsRefusedByName(t *testing.T) {
	for key, value := range map[string]string{
		"runcmd": "[touch /tmp/x]", "bootcmd": "[[touch, /tmp/x]]", "users": "[default]", "user": "{name: a}", "groups": "[a]",
		"ssh_authorized_keys": "[ssh-ed25519 AAAA]", "ssh_keys": "{ed25519_private: x}", "ssh_pwauth": "true", "ssh_import_id": "[gh:a]",
		"chpasswd": "{expire: false}", "password": "x", "disable_root": "false",
		"write_files": "[{path: /etc/x, content: z}]", "packages": "[x]", "package_update": "true", "apt": "{sources: {}}", "snap": "{}",
		"disk_setup": "{}", "fs_setup": "[]", "mounts": "[]", "swap": "{}", "power_state": "{mode: reboot}", "phone_home": "{url: http://x}",
		"ca_certs": "{trusted: [x]}", "ca-certs": "{trusted: [x]}", "rsyslog": "{}", "salt_minion": "{}", "ansible": "{}", "puppet": "{}", "chef": "{}",
		"cloud_init_modules": "[runcmd]", "cloud_config_modules": "[runcmd]", "cloud_final_modules": "[runcmd]", "datasource": "{}", "datasource_list": "[None]",
		"merge_how": "[]", "merge_type": "[]", "vendor_data": "{enabled: true}", "vendor_data2": "{}", "system_info": "{}", "output": "{all: \"| sh\"}",
		"growpart": "{}", "resize_rootfs": "true", "manage_etc_hosts": "true", "resolv_conf": "{}", "manage_resolv_conf": "true",
		"network": "{config: disabled}", "updates": "{}", "reporting": "{}", "launch-index": "0", "autoinstall": "{}", "drivers": "{}", "wireguard": "{}",
		"Hostname": "x", "host_name": "x", "prefer_fqdn_over_hostname": "true", "preserve_hostname": "true",
	} {
		_, err := Parse(Files{UserDataFile: []byte(userData(key + ": " + value + "\n"))})
		if cause.Of(err) != cause.SeedRefused || !strings.Contains(err.Error(), ": "+key+": not on the allow-list") {
			t.Errorf("%s: %v", key, err)
		}
	}
	for is, text := range map[string]string{
		"gzip": "\x1f\x8b\x08\x00", "a script": "#!/bin/sh\ntrue\n", "#include": "#include\nhttp://x\n", "#include-once": "#include-once\nhttp://x\n",
		"#upstart-job": "#upstart-job\n", "#part-handler": "#part-handler\ndef list_types(): pass\n", "#cloud-boothook": "#cloud-boothook\ntrue\n",
		"#cloud-config-archive": "#cloud-config-archive\n- type: text/x-shellscript\n", "#cloud-config-jsonp": "#cloud-config-jsonp\n[]\n",
		"a template (jinja)": "## template: jinja\n#cloud-config\nhostname: a\n", "MIME": "Content-Type: multipart/mixed; boundary=\"x\"\nMIME-Version: 1.0\n\n--x\n",
	} {
		for name, seed := range map[string]string{"as it is": text, "after blanks": "\n \t" + text} {
			_, err := Parse(Files{UserDataFile: []byte(seed)})
			if cause.Of(err) != cause.SeedRefused || !strings.Contains(err.Error(), "user-data is "+is+":") {
				t.Errorf("%s, %s: %v", is, name, err)
			}
		}
	}
	for name, text := range map[string]string{
		"nothing": "", "no header": agentSection, "a longer header": "#cloud-config-x\n" + agentSection, "a byte order mark": "\xef\xbb\xbf" + userData(""),
		"a template later": " #cloud-config\n" + agentSection,
	} {
		if _, err := Parse(Files{UserDataFile: []byte(text)}); cause.Of(err) != cause.SeedRefused {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, file := range []string{"vendor-data", "vendor-data2", "USER-DATA", "user-data.txt"} {
		_, err := Parse(Files{UserDataFile: []byte(userData("")), file: nil})
		if cause.Of(err) != cause.SeedRefused || !strings.Contains(err.Error(), file) {
			t.Errorf("file %s: %v", file, err)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		user, meta, net string
		code            cause.Code
		says            string
	}{
		"no section of ours":          {user: "#cloud-config\nhostname: a\n", code: cause.SeedRefused, says: "cvm_agent.initdata: is missing"},
		"more in our section":         {user: userData("") + "  runcmd: [x]\n", code: cause.SeedRefused, says: "cvm_agent.runcmd: not on the allow-list"},
		"a mirror that is none":       {user: userData("") + "  mirrors: {registry.example.org: [\"a b\"]}\n", code: cause.SeedRefused, says: "cvm_agent.mirrors.registry.example.org"},
		"a mirror's path":             {user: userData("") + "  mirrors: {registry.example.org: [\"a/b\"]}\n", code: cause.SeedRefused, says: "host[:port]"},
		"a proxy":                     {user: userData("") + "  proxy: http://192.0.2.1\n", code: cause.SeedRefused, says: "cvm_agent.proxy: not on"},
		"a key twice":                 {user: userData("hostname: a\nhostname: b\n"), code: cause.SeedMalformed, says: "\"hostname\" already defined"},
		"an alias":                    {user: userData("hostname: &a b\nfqdn: *a\n"), code: cause.SeedMalformed, says: "aliases"},
		"a tag":                       {user: userData("hostname: !!python/object/apply:os.system [x]\n"), code: cause.SeedMalformed, says: "tags"},
		"two documents":               {user: userData("") + "---\nruncmd: [x]\n", code: cause.SeedMalformed, says: ""},
		"a list for a name":           {user: userData("hostname: [a]\n"), code: cause.SeedMalformed, says: "hostname"},
		"a name with a line break":    {user: userData("hostname: \"a\\nb\"\n"), code: cause.SeedRefused, says: "line 2, column"},
		"a name that ends in one":     {user: userData("hostname: \"a\\n\"\n"), code: cause.SeedRefused, says: "hostname"},
		"a template in a value":       {user: userData("hostname: \"{{ x }}\"\n"), code: cause.SeedRefused, says: "hostname"},
		"a zone that climbs":          {user: userData("timezone: ../../etc/shadow\n"), code: cause.SeedRefused, says: "timezone"},
		"an absolute zone":            {user: userData("timezone: /etc/shadow\n"), code: cause.SeedRefused, says: "timezone"},
		"a locale that is a command":  {user: userData("locale: \"C; reboot\"\n"), code: cause.SeedRefused, says: "locale"},
		"a client for time":           {user: userData("ntp: {servers: [a], ntp_client: x}\n"), code: cause.SeedRefused, says: "ntp.ntp_client: not on"},
		"a template for time":         {user: userData("ntp: {servers: [a], config: {template: x}}\n"), code: cause.SeedRefused, says: "ntp.config"},
		"a server with a line break":  {user: userData("ntp: {servers: [\"a\\nb\"]}\n"), code: cause.SeedRefused, says: "ntp.servers[0]"},
		"no servers":                  {user: userData("ntp: {servers: []}\n"), code: cause.SeedRefused, says: "ntp.servers"},
		"keys in meta-data":           {user: userData(""), meta: "public-keys: [x]\n", code: cause.SeedRefused, says: "meta-data: line 1, column 1: public-keys: not on"},
		"a network in meta-data":      {user: userData(""), meta: "network-interfaces: \"auto eth0\"\n", code: cause.SeedRefused, says: "network-interfaces"},
		"an instance that climbs":     {user: userData(""), meta: "instance-id: ../x\n", code: cause.SeedRefused, says: "instance-id"},
		"version 1":                   {user: userData(""), net: "version: 1\nconfig: []\n", code: cause.SeedRefused, says: "config: not on"},
		"version 3":                   {user: userData(""), net: "version: 3\n", code: cause.SeedRefused, says: "version"},
		"bridges":                     {user: userData(""), net: network("bridges: {}\n"), code: cause.SeedRefused, says: "bridges: not on"},
		"wireguard":                   {user: userData(""), net: network("tunnels: {}\n"), code: cause.SeedRefused, says: "tunnels: not on"},
		"another renderer":            {user: userData(""), net: network("renderer: NetworkManager\n"), code: cause.SeedRefused, says: "renderer: not on"},
		"networkd's own words":        {user: userData(""), net: network("    networkd: {}\n"), code: cause.SeedRefused, says: "ethernets.eth0.networkd"},
		"podman's bridge":             {user: userData(""), net: "version: 2\nethernets: {podman0: {dhcp4: true}}\n", code: cause.SeedRefused, says: "ethernets.podman0"},
		"every interface":             {user: userData(""), net: "version: 2\nethernets: {a: {match: {name: \"*\"}}}\n", code: cause.SeedRefused, says: "match.name"},
		"a driver":                    {user: userData(""), net: "version: 2\nethernets: {a: {match: {driver: virtio}}}\n", code: cause.SeedRefused, says: "match.driver"},
		"an identifier that climbs":   {user: userData(""), net: "version: 2\nethernets: {\"../x\": {match: {name: eth0}}}\n", code: cause.SeedRefused, says: "identifier"},
		"a name by name":              {user: userData(""), net: "version: 2\nethernets: {a: {match: {name: eth0}, set-name: eth1}}\n", code: cause.SeedRefused, says: "macaddress"},
		"an address with a zone":      {user: userData(""), net: network("    gateway6: \"fe80::1%eth0\"\n"), code: cause.SeedRefused, says: "gateway6"},
		"an address that is none":     {user: userData(""), net: network("    addresses: [\"192.0.2.1\\n[Exec]\"]\n"), code: cause.SeedRefused, says: "addresses[0]"},
		"a route to nowhere":          {user: userData(""), net: network("    routes: [{to: x, via: 192.0.2.1}]\n"), code: cause.SeedRefused, says: "routes[0].to"},
		"a domain with a line break":  {user: userData(""), net: network("    nameservers: {search: [\"a\\nb\"]}\n"), code: cause.SeedRefused, says: "search[0]"},
		"a tiny MTU":                  {user: userData(""), net: network("    mtu: 68\n"), code: cause.SeedRefused, says: "mtu"},
		"network beside its contents": {user: userData(""), net: "network: {version: 2}\nversion: 2\n", code: cause.SeedRefused, says: "network"},
	} {
		files := Files{UserDataFile: []byte(c.user)}
		if c.meta != "" {
			files[MetaDataFile] = []byte(c.meta)
		}
		if c.net != "" {
			files[NetworkConfigFile] = []byte(c.net)
		}
		_, err := Parse(files)
		if cause.Of(err) != c.code || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, expected %s with %q", name, err, c.code, c.says)
		}
	}
	if _, err := Parse(Files{MetaDataFile: nil}); cause.Of(err) != cause.SeedMissing {
		t.Errorf("no user-data: %v", err)
	}
}

// The largest initdata, as a block and quoted, is read in bounded time.
func TestTheLargestInitdata(t *testing.T) {
	line := strings.Repeat("x", 99) + "\n"
	text := strings.Repeat(line, policy.MaxInitdata/len(line))
	for name, section := range map[string]string{
		"block":  "cvm_agent:\n  initdata: |\n    " + strings.ReplaceAll(strings.TrimSuffix(text, "\n"), "\n", "\n    ") + "\n",
		"quoted": "cvm_agent:\n  initdata: \"" + strings.ReplaceAll(text, "\n", `\n`) + "\"\n",
	} {
		start := time.Now()
		s, err := Parse(Files{UserDataFile: []byte("#cloud-config\n" + section)})
		if err != nil || string(s.Initdata) != text {
			t.Fatalf("%s: %v", name, err)
		}
		if took := time.Since(start); took > 20*time.Second {
			t.Errorf("%s: %s", name, took)
		}
	}
	_, err := Parse(Files{UserDataFile: []byte(userData("#" + strings.Repeat("x", int(Limits[UserDataFile]))))})
	if cause.Of(err) != cause.SeedMalformed {
		t.Errorf("over the limit: %v", err)
	}
}

func TestSchemaIsUpToDate(t *testing.T) {
	want, err := Schema()
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile("seed.schema.json")
	if err != nil || string(got) != string(want) {
		t.Fatalf("seed.schema.json is stale (%v): run `cvmctl seed schema > initrd/seed/seed.schema.json`", err)
	}
	for _, member := range []string{UserDataFile, MetaDataFile, NetworkConfigFile, "cvm_agent", "ethernets", "nameservers"} {
		if !strings.Contains(string(got), `"`+member+`"`) {
			t.Errorf("the schema lacks %s", member)
		}
	}
	if strings.Contains(string(got), `"additionalProperties": true`) {
		t.Error("the schema is open")
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{userData(""), userData("hostname: a\nntp: {servers: [b]}\n"), "#!/bin/sh", "\x1f\x8b", userData("runcmd: [a]\n")} {
		f.Add([]byte(s), []byte("instance-id: a\n"))
	}
	f.Fuzz(func(t *testing.T, user, meta []byte) {
		s, err := Parse(Files{UserDataFile: user, MetaDataFile: meta})
		check(t, s, err)
	})
}

func FuzzNetworkConfig(f *testing.F) {
	for _, s := range []string{network(""), "network: {version: 2}\n", "version: 2\nethernets: {a: {match: {name: \"en*\"}, routes: [{to: default, via: 192.0.2.1}]}}\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, config []byte) {
		s, err := Parse(Files{UserDataFile: []byte(userData("")), NetworkConfigFile: config})
		check(t, s, err)
	})
}

// check: what was accepted, written anew, is accepted once more and says the
// same; a refusal is one line with a code of the seed's.
func check(t *testing.T, s *Seed, err error) {
	if err != nil {
		switch cause.Of(err) {
		case cause.SeedRefused, cause.SeedMalformed, cause.SeedMissing:
		default:
			t.Fatalf("%v", err)
		}
		if strings.ContainsAny(bounded.OneLine(err.Error()), "\n\r\x1b") {
			t.Fatalf("%q", err)
		}
		return
	}
	clean, err := s.Sanitized()
	if err != nil {
		t.Fatal(err)
	}
	files := Files{}
	for name, text := range clean {
		files[name] = text
	}
	files[UserDataFile] = []byte(strings.Replace(string(clean[UserDataFile]), "{", `{"cvm_agent": {"initdata": "x"},`, 1))
	files[UserDataFile] = []byte(strings.NewReplacer(`"enabled": true,`, "", ",}", "}", ",\n}", "\n}").Replace(string(files[UserDataFile])))
	again, err := Parse(files)
	if err != nil {
		t.Fatalf("%v\n%s", err, files[UserDataFile])
	}
	second, err := again.Sanitized()
	if err != nil {
		t.Fatal(err)
	}
	for name := range clean {
		if string(second[name]) != string(clean[name]) {
			t.Fatalf("%s:\n%s\nbecomes\n%s", name, clean[name], second[name])
		}
	}
}
