package appraisal

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tdxtest"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// rtmr3 is the register in memory.
type rtmr3 [48]byte

func (r *rtmr3) Name() string                         { return "rtmr3" }
func (r *rtmr3) Index() int                           { return eventlog.IndexRTMR3 }
func (r *rtmr3) Read(context.Context) ([]byte, error) { return slices.Clone(r[:]), nil }
func (r *rtmr3) Extend(_ context.Context, d map[crypto.Hash][]byte) error {
	*r = sha512.Sum384(append(r[:], d[crypto.SHA384]...))
	return nil
}

// measured is the log of a first launch, and the register that it leaves.
func measured(t testing.TB, versions ...uint64) ([]byte, [48]byte) {
	t.Helper()
	var r rtmr3
	log, err := eventlog.Open(t.Context(), t.TempDir(), &r)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	events := []eventlog.Event{
		{Kind: eventlog.KindPolicy, Policy: "shop", PolicyVersion: 3, PolicyDigest: "sha256:" + strings.Repeat("d", 64), Signers: []string{strings.Repeat("a", 64)}},
		{Kind: eventlog.KindImage, Workload: "web", Image: "registry.example/web@sha256:" + strings.Repeat("b", 64)},
	}
	for _, v := range versions {
		events = append(events, eventlog.Event{Kind: eventlog.KindPolicyStaged, Policy: "shop", PolicyVersion: v, PolicyDigest: "sha256:" + strings.Repeat("e", 64), Signers: []string{strings.Repeat("a", 64)}})
	}
	for _, e := range events {
		if err := log.Append(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	return log.Bytes(), r
}

func TestTDXSessionOfOurs(t *testing.T) {
	log, register := measured(t)
	c := newTDX(t, tdxtest.Config{}).ours(t, log)
	c.report.RTMR[3] = register
	a := c.sign(t).appraise(t)
	accepted(t, a)
	if a.Facts.Log == nil || a.Facts.Log.Running.Policy != "shop" || a.Facts.Log.Running.Version != 3 || a.Facts.Log.Register != "RTMR3" || len(a.Facts.Log.Running.Images) != 1 {
		t.Fatalf("%+v", a.Facts.Log)
	}
	if !strings.HasPrefix(a.Facts.Identity, "key:") || len(a.Facts.Identity) != 4+64 {
		t.Fatalf("identity %q", a.Facts.Identity)
	}
	challenge, pending, err := c.verifier.Challenge(&kbs.CVMAgentAuth{Version: kbs.Dialect}, rand.Reader)
	if challenge != nil || pending != nil || err != nil || c.verifier.TEE() != "tdx" {
		t.Fatalf("%+v, %+v, %v", challenge, pending, err)
	}
}

// The instance's name is the thumbprint of its key, the same in every session,
// and another for another key.
func TestTDXIdentity(t *testing.T) {
	log, register := measured(t)
	c := newTDX(t, tdxtest.Config{})
	c.report.RTMR[3] = register
	key := tdxtest.NewKey(t)
	identity := func(key *ecdsa.PrivateKey, nonce string) string {
		c.nonce = nonce
		c.ours(t, log)
		c.add.Instance = tdxtest.InstanceJWS(t, key, nonce)
		a := c.sign(t).appraise(t)
		accepted(t, a)
		return a.Facts.Identity
	}
	jwk := jose.JSONWebKey{Key: key.Public()}
	thumbprint, err := jwk.Thumbprint(crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	first := identity(key, "one")
	if want := "key:" + hex.EncodeToString(thumbprint); first != want || identity(key, "two") != want || identity(tdxtest.NewKey(t), "one") == want {
		t.Fatalf("%s, expected %s", first, want)
	}
}

// Under dialect kbs the name is of the launch: any register that a launch
// fixes changes it, RTMR3 and report_data do not.
func TestTDXLaunchIdentity(t *testing.T) {
	c := newTDX(t, tdxtest.Config{})
	identity := func(change func(*tdxtest.Report)) string {
		c.report = tdxtest.Report{MRTD: fill(1)}
		change(&c.report)
		a := c.sign(t).appraise(t)
		accepted(t, a)
		return a.Facts.Identity
	}
	base := identity(func(*tdxtest.Report) {})
	for what, change := range map[string]func(*tdxtest.Report){
		"MRTD":          func(r *tdxtest.Report) { r.MRTD[47]++ },
		"RTMR0":         func(r *tdxtest.Report) { r.RTMR[0][0]++ },
		"RTMR1":         func(r *tdxtest.Report) { r.RTMR[1][0]++ },
		"RTMR2":         func(r *tdxtest.Report) { r.RTMR[2][47]++ },
		"MRCONFIGID":    func(r *tdxtest.Report) { r.MRConfigID[0]++ },
		"MROWNER":       func(r *tdxtest.Report) { r.MROwner[0]++ },
		"MROWNERCONFIG": func(r *tdxtest.Report) { r.MROwnerConfig[0]++ },
	} {
		if identity(change) == base {
			t.Errorf("another %s has the same identity", what)
		}
	}
	c.nonce = "another"
	if identity(func(r *tdxtest.Report) { r.RTMR[3][0]++ }) != base {
		t.Error("RTMR3 or report_data changes the identity")
	}
}

func TestTDXInstanceKeyRefused(t *testing.T) {
	log, register := measured(t)
	c := newTDX(t, tdxtest.Config{})
	c.report.RTMR[3] = register
	key := tdxtest.NewKey(t)
	jws := func(opts *jose.SignerOptions, alg jose.SignatureAlgorithm, key any, payload string) string {
		s, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, opts)
		if err != nil {
			t.Fatal(err)
		}
		o, err := s.Sign([]byte(payload))
		if err != nil {
			t.Fatal(err)
		}
		out, err := o.CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := tdxtest.InstanceJWS(t, key, c.nonce)
	parts := strings.Split(good, ".")
	otherParts := strings.Split(tdxtest.InstanceJWS(t, tdxtest.NewKey(t), c.nonce), ".")
	for what, s := range map[string]string{
		"missing":                    "",
		"over another nonce":         tdxtest.InstanceJWS(t, key, "bm9uY2X="),
		"over the nonce and more":    tdxtest.InstanceJWS(t, key, c.nonce+"\n"),
		"over nothing":               tdxtest.InstanceJWS(t, key, ""),
		"without a jwk":              jws(nil, jose.ES256, key, c.nonce),
		"with ES384":                 jws(&jose.SignerOptions{EmbedJWK: true}, jose.ES384, p384, c.nonce),
		"with a shared secret":       jws(nil, jose.HS256, bytes.Repeat([]byte{1}, 32), c.nonce),
		"another's header":           otherParts[0] + "." + parts[1] + "." + parts[2],
		"another's signature":        parts[0] + "." + parts[1] + "." + otherParts[2],
		"no signature":               parts[0] + "." + parts[1] + ".",
		"alg none":                   "eyJhbGciOiJub25lIn0." + parts[1] + ".",
		"not compact":                `{"payload":"` + parts[1] + `","protected":"` + parts[0] + `","signature":"` + parts[2] + `"}`,
		"a critical unknown header":  jws((&jose.SignerOptions{EmbedJWK: true}).WithHeader("crit", []string{"pad"}).WithHeader("pad", "x"), jose.ES256, key, c.nonce),
		"no JWS at all":              "x",
		"dots":                       "..",
		"an encrypted one's 5 parts": good + ".a.b",
	} {
		t.Run(what, func(t *testing.T) {
			c.ours(t, log)
			c.add.Instance = s
			a := c.sign(t).appraise(t)
			refused(t, a, CheckInstanceKey)
			if a.Facts.Identity != "" {
				t.Errorf("identity %q", a.Facts.Identity)
			}
		})
	}
	// A session without a nonce proves nothing, even over nothing.
	c.ours(t, log)
	c.in.Nonce, c.add.Instance = "", tdxtest.InstanceJWS(t, key, "")
	refused(t, c.sign(t).appraise(t), CheckInstanceKey)
	long := jws((&jose.SignerOptions{EmbedJWK: true}).WithHeader("pad", strings.Repeat("x", maxInstanceJWS)), jose.ES256, key, c.nonce)
	if _, err := instanceKey(long, c.nonce); err == nil {
		t.Error("too long, and accepted")
	}
}

// Lesson 5: a launch field of zeros is not "unset".
func TestLesson05_MRConfigIDZero(t *testing.T) {
	initdata := []byte("version = \"0.1.0\"\nalgorithm = \"sha384\"\n[data]\n\"x\" = \"y\"\n")
	in, err := policy.ParseInitdata(initdata)
	if err != nil {
		t.Fatal(err)
	}
	c := newTDX(t, tdxtest.Config{})
	c.in.InitData = initdata
	copy(c.report.MRConfigID[:], in.MRConfigID())
	a := c.sign(t).appraise(t)
	accepted(t, a)
	if a.Facts.Launch == nil {
		t.Fatal("no launch facts")
	}
	for what, change := range map[string]func(){
		"zero":           func() { c.report.MRConfigID = [48]byte{} },
		"another digest": func() { c.report.MRConfigID = fill(9) },
		"last byte":      func() { copy(c.report.MRConfigID[:], in.MRConfigID()); c.report.MRConfigID[47] ^= 1 },
		"other initdata": func() {
			copy(c.report.MRConfigID[:], in.MRConfigID())
			c.in.InitData = append(slices.Clone(initdata), '\n')
		},
		"no initdata at all, but zero": func() { c.report.MRConfigID, c.in.InitData = [48]byte{}, []byte{} },
	} {
		change()
		a := c.sign(t).appraise(t)
		refused(t, a, CheckLaunch)
		if a.Facts.Launch != nil {
			t.Errorf("%s: launch facts", what)
		}
		c.in.InitData = initdata
	}
}

// Lesson 9: evidence without its log is refused; so is one that is not what
// the register holds.
func TestLesson09_TDXLog(t *testing.T) {
	log, register := measured(t)
	longer, longerRegister := measured(t, 4)
	other, _ := measured(t, 5)
	changed := bytes.Replace(slices.Clone(log), []byte(`"workload":"web"`), []byte(`"workload":"wev"`), 1)
	half := len(log)
	for what, c := range map[string]struct {
		log      []byte
		register [48]byte
	}{
		"missing":                       {nil, register},
		"missing, register never used":  {nil, [48]byte{}},
		"empty register with a log":     {log, [48]byte{}},
		"last event left out":           {longer[:half], longerRegister},
		"an event more":                 {longer, register},
		"one event changed":             {changed, register},
		"one event of another launch":   {other, longerRegister},
		"events in another order":       {reordered(t, log), register},
		"cut inside an event":           {log[:half-1], register},
		"a register of another launch":  {log, fill(1)},
		"not a log":                     {[]byte("log"), register},
		"the log twice":                 {append(slices.Clone(log), log...), register},
		"another register's log (PCRs)": {bytes.ReplaceAll(slices.Clone(log), []byte{108}, []byte{1}), register},
	} {
		t.Run(what, func(t *testing.T) {
			s := newTDX(t, tdxtest.Config{}).ours(t, c.log)
			s.report.RTMR[3] = c.register
			a := s.sign(t).appraise(t)
			refused(t, a, CheckEventLog)
			if a.Facts.Log != nil {
				t.Error("facts of a log that does not count")
			}
		})
	}
}

// reordered swaps the two records of a log and numbers them anew.
func reordered(t testing.TB, log []byte) []byte {
	t.Helper()
	// A record begins with the TLV of its number: 5 bytes of head, 8 of value.
	first := bytes.LastIndex(log, log[:5])
	if first <= 0 {
		t.Fatal("one record")
	}
	a, b := slices.Clone(log[:first]), slices.Clone(log[first:])
	head := 5 + 8
	copy(a[:head], log[first:first+head])
	copy(b[:head], log[:head])
	return append(b, a...)
}

// Lesson 11: the quote is over this session's key, nonce, log and instance.
func TestLesson11_TDXSwaps(t *testing.T) {
	log, register := measured(t)
	base := newTDX(t, tdxtest.Config{}).ours(t, log)
	base.report.RTMR[3] = register
	base.sign(t)
	for what, swap := range map[string]func(*tdxCase){
		"key":      func(c *tdxCase) { c.key.X = "z" },
		"nonce":    func(c *tdxCase) { c.nonce = "another" },
		"log":      func(c *tdxCase) { c.add.EventLog, _ = measured(t, 4) },
		"no log":   func(c *tdxCase) { c.add.EventLog = nil },
		"instance": func(c *tdxCase) { c.add.Instance = tdxtest.InstanceJWS(t, tdxtest.NewKey(t), c.nonce) },
		"dialect":  func(c *tdxCase) { c.in.Dialect, c.in.Additional = kbs.DialectKBS, "" },
	} {
		c := *base
		swap(&c)
		c.bind(t)
		a := c.appraise(t)
		refused(t, a, CheckReportData)
		if strings.HasPrefix(a.Facts.Identity, "key:") {
			t.Errorf("%s: identity %s", what, a.Facts.Identity)
		}
	}
	// The 16 bytes after report_data are zero.
	for _, at := range []int{48, 63} {
		c := *base
		c.bind(t)
		copy(c.report.ReportData[:], c.in.ReportData[:])
		c.report.ReportData[at] = 1
		c.quote = c.platform.Quote(t, c.report)
		refused(t, c.appraise(t), CheckReportData)
	}
}

func TestTDXOffline(t *testing.T) {
	c := newTDX(t, tdxtest.Config{}).sign(t)
	for what, r := range map[string]struct {
		data []byte
		want Outcome
	}{
		"unknown":            {nil, NotChecked},
		"known":              {c.in.ReportData[:], Passed},
		"known with padding": {append(slices.Clone(c.in.ReportData[:]), make([]byte, 16)...), Passed},
		"too much padding":   {append(slices.Clone(c.in.ReportData[:]), make([]byte, 17)...), Failed},
		"another":            {bytes.Repeat([]byte{1}, 48), Failed},
		"cut":                {c.in.ReportData[:47], Failed},
		"empty":              {[]byte{}, Failed},
	} {
		in := c.in
		in.ReportData = [48]byte{}
		in.Offline = &Offline{ReportData: r.data}
		a, err := c.verifier.AppraiseRaw(c.quote, nil, in)
		if err != nil || a.Verdict.Outcome(CheckReportData) != r.want || (a.Verdict.Refusal() == nil) != (r.want != Failed) {
			t.Errorf("%s: %v, %v", what, a.Verdict.Refusal(), err)
		}
	}
}

// What nobody here looks at is listed.
func TestTDXNotChecked(t *testing.T) {
	log, register := measured(t)
	c := newTDX(t, tdxtest.Config{}).ours(t, log)
	c.report.RTMR[3] = register
	c.add.Activation = bytes.Repeat([]byte{1}, 32)
	c.bind(t)
	var members map[string]json.RawMessage
	if err := json.Unmarshal([]byte(c.in.Additional), &members); err != nil {
		t.Fatal(err)
	}
	members["nvidia"] = json.RawMessage(`{}`)
	text, err := json.Marshal(members)
	if err != nil {
		t.Fatal(err)
	}
	c.in.Additional = string(text)
	if c.in.ReportData, err = kbs.ReportData(c.in.Additional, c.nonce, c.key); err != nil {
		t.Fatal(err)
	}
	copy(c.report.ReportData[:], c.in.ReportData[:])
	c.quote = c.platform.Quote(t, c.report)
	a := c.appraise(t)
	accepted(t, a)
	slices.Sort(a.Facts.Not)
	if !slices.Equal(a.Facts.Not, []string{"cvm-agent-activation", "nvidia"}) {
		t.Fatalf("%v", a.Facts.Not)
	}
	for _, name := range []string{"additional-evidence:nvidia", "additional-evidence:cvm-agent-activation", CheckCCEL, "tdx-owner", "tdx-user-data"} {
		if !slices.ContainsFunc(a.Verdict.Checks, func(c Check) bool { return c.Name == name && c.Outcome == NotChecked }) {
			t.Errorf("%s is not listed", name)
		}
	}
}
