package seed

// Document is the whole seed: one member for each file on the disk. What is
// not described here is refused.
type Document struct {
	UserData      UserData       `json:"user-data"`                // begins with the line #cloud-config
	MetaData      *MetaData      `json:"meta-data,omitempty"`      // NoCloud's
	NetworkConfig *NetworkConfig `json:"network-config,omitempty"` // cloud-init's version 2, of Ethernet alone
}

// UserData is the file user-data.
type UserData struct {
	Hostname string   `json:"hostname,omitempty" jsonschema:"maxLength=63"` // one DNS label
	FQDN     string   `json:"fqdn,omitempty" jsonschema:"maxLength=253"`    // DNS name
	Timezone string   `json:"timezone,omitempty" jsonschema:"maxLength=99"` // name of the tz database, such as Europe/Berlin
	Locale   string   `json:"locale,omitempty" jsonschema:"maxLength=32"`   // such as C.UTF-8
	NTP      *NTP     `json:"ntp,omitempty"`
	CVMAgent CVMAgent `json:"cvm_agent"`
}

// NTP names time servers. The time they give is the host's word.
type NTP struct {
	Servers []string `json:"servers" jsonschema:"minItems=1,maxItems=8"` // DNS names or addresses
}

// CVMAgent is ours. cloud-init never sees it.
type CVMAgent struct {
	Initdata string `json:"initdata" jsonschema:"minLength=1"` // the initdata document, to the byte
	// Mirrors chooses from the policy's, by registry host and in the order in
	// which they are tried. Unset: all of them.
	Mirrors map[string][]string `json:"mirrors,omitempty"`
}

// MetaData is the file meta-data.
type MetaData struct {
	InstanceID    string `json:"instance-id,omitempty" jsonschema:"maxLength=64"`
	LocalHostname string `json:"local-hostname,omitempty" jsonschema:"maxLength=253"` // DNS name; hostname of user-data wins
}

// NetworkConfig is the file network-config: either network and what it has, or
// that alone.
type NetworkConfig struct {
	Network   *Network            `json:"network,omitempty"`
	Version   int                 `json:"version,omitempty" jsonschema:"enum=2"`
	Ethernets map[string]Ethernet `json:"ethernets,omitempty"`
}

// Network is version 2 of cloud-init's network configuration.
type Network struct {
	Version   int                 `json:"version" jsonschema:"enum=2"`
	Ethernets map[string]Ethernet `json:"ethernets,omitempty"` // by name, or by any identifier when match is given
}

// Ethernet is one interface, whose name begins with en or eth.
type Ethernet struct {
	Match       *Match       `json:"match,omitempty"`
	SetName     string       `json:"set-name,omitempty"` // needs match.macaddress
	DHCP4       *bool        `json:"dhcp4,omitempty"`
	DHCP6       *bool        `json:"dhcp6,omitempty"`
	Addresses   []string     `json:"addresses,omitempty" jsonschema:"maxItems=16"` // address/prefix
	Gateway4    string       `json:"gateway4,omitempty"`
	Gateway6    string       `json:"gateway6,omitempty"`
	Routes      []Route      `json:"routes,omitempty" jsonschema:"maxItems=32"`
	Nameservers *Nameservers `json:"nameservers,omitempty"`
	MTU         *uint16      `json:"mtu,omitempty" jsonschema:"minimum=576"`
	Optional    *bool        `json:"optional,omitempty"`
}

// Match says which interface is meant.
type Match struct {
	Name       string `json:"name,omitempty"`       // may end with *
	MACAddress string `json:"macaddress,omitempty"` // six bytes, colons between
}

// Route is a static route.
type Route struct {
	To     string  `json:"to"`  // default, or address/prefix
	Via    string  `json:"via"` // address
	Metric *uint32 `json:"metric,omitempty"`
}

// Nameservers are DNS servers and the domains to search.
type Nameservers struct {
	Addresses []string `json:"addresses,omitempty" jsonschema:"maxItems=8"`
	Search    []string `json:"search,omitempty" jsonschema:"maxItems=8"`
}
