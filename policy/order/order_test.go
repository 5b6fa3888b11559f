package order_test

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
	"github.com/cc-runtime/cvm-agent/policy/dsse/dssetest"
	"github.com/cc-runtime/cvm-agent/policy/order"
)

var now = time.Date(2026, 3, 4, 5, 6, 7, 500, time.UTC)

const boot = "0f1e2d3c-0000-4000-8000-0123456789ab"

func good(operation string) order.Order {
	return order.Order{Operation: operation, Policy: "shop", InstanceID: "i-1", BootID: boot,
		Challenge: strings.Repeat("ab", 32), Expires: now.Add(order.DefaultTTL).UTC().Truncate(time.Second).Format(time.RFC3339)}
}

func sign(t testing.TB, o order.Order, carried []byte, signers ...dsse.Signer) *order.Document {
	t.Helper()
	data, err := order.Sign(o, carried, signers...)
	if err != nil {
		t.Fatal(err)
	}
	d, err := order.Parse(data)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestVerify(t *testing.T) {
	both, upgrader, stranger := dssetest.New(t, "ecdsa"), dssetest.New(t, "ed25519"), dssetest.New(t, "rsa")
	receiver := order.Receiver{Policy: "shop", InstanceID: "i-1", BootID: boot, Keys: []policy.OrderKey{
		{Key: both.PEM, Orders: []string{"upgrade", "destroy"}}, {Key: upgrader.PEM, Orders: []string{"upgrade"}}}}
	carried := []byte(`{"payloadType":"a signed policy"}`)
	at := func(d time.Duration) func(*order.Order) {
		return func(o *order.Order) { o.Expires = now.Add(d).UTC().Truncate(time.Second).Format(time.RFC3339) }
	}
	for name, tc := range map[string]struct {
		operation string
		signer    *dssetest.Key
		change    func(*order.Order)
		spoil     func(*order.Document)
		code      cause.Code
	}{
		"an upgrade by a key for both":               {order.Upgrade, both, nil, nil, ""},
		"an upgrade by a key for upgrades":           {order.Upgrade, upgrader, nil, nil, ""},
		"a destroy by a key for both":                {order.Destroy, both, nil, nil, ""},
		"an expiry at the last moment":               {order.Destroy, both, at(time.Second), nil, ""},
		"an expiry as far ahead as may be":           {order.Destroy, both, at(order.MaxAhead), nil, ""},
		"a destroy by a key for upgrades":            {order.Destroy, upgrader, nil, nil, cause.OrderSignature},
		"an order by a stranger":                     {order.Destroy, stranger, nil, nil, cause.OrderSignature},
		"an order that ended":                        {order.Destroy, both, at(-time.Second), nil, cause.OrderExpired},
		"an order that ends now":                     {order.Destroy, both, at(0), nil, cause.OrderExpired},
		"an order that is good for too long":         {order.Destroy, both, at(order.MaxAhead + 2*time.Second), nil, cause.OrderTooLong},
		"an order for another policy":                {order.Destroy, both, func(o *order.Order) { o.Policy = "other" }, nil, cause.OrderOtherPolicy},
		"an order for another instance":              {order.Destroy, both, func(o *order.Order) { o.InstanceID = "i-2" }, nil, cause.OrderOtherInstance},
		"an order for an instance without an id":     {order.Destroy, both, func(o *order.Order) { o.InstanceID = "" }, nil, cause.OrderOtherInstance},
		"an order for another boot":                  {order.Destroy, both, func(o *order.Order) { o.BootID = "1" + boot[1:] }, nil, cause.OrderOtherBoot},
		"a policy that was put in another's place":   {order.Upgrade, both, nil, func(d *order.Document) { d.Carries[3] ^= 1 }, cause.OrderCarries},
		"an upgrade without what it carries":         {order.Upgrade, both, nil, func(d *order.Document) { d.Carries = nil }, cause.OrderCarries},
		"a destroy that carries something":           {order.Destroy, both, nil, func(d *order.Document) { d.Carries = []byte("x") }, cause.OrderCarries},
		"a signature that was taken off":             {order.Destroy, both, nil, strip, cause.OrderUnsigned},
		"an envelope that is none":                   {order.Destroy, both, nil, func(d *order.Document) { d.Order = json.RawMessage(`[]`) }, cause.OrderMalformed},
		"an envelope of another type, signed so":     {order.Destroy, both, nil, retype(both), cause.OrderMalformed},
		"a payload with a member more, signed so":    {order.Destroy, both, nil, repack(both, `}`, `,"x":1}`), cause.OrderMalformed},
		"a payload with a space, signed so":          {order.Destroy, both, nil, repack(both, `{`, `{ `), cause.OrderMalformed},
		"a payload with a member less, signed so":    {order.Destroy, both, nil, repack(both, `"carries":"",`, ``), cause.OrderMalformed},
		"another version, signed so":                 {order.Destroy, both, nil, repack(both, `order/v1`, `order/v2`), cause.OrderMalformed},
		"an operation that there is not, signed so":  {order.Destroy, both, nil, repack(both, `"destroy"`, `"restart"`), cause.OrderMalformed},
		"a challenge of another shape, signed so":    {order.Destroy, both, nil, repack(both, `"abab`, `"ABab`), cause.OrderMalformed},
		"an expiry in another time zone, signed so":  {order.Destroy, both, nil, repack(both, `Z"`, `+00:00"`), cause.OrderMalformed},
		"an expiry with a fraction, signed so":       {order.Destroy, both, nil, repack(both, `Z"`, `.5Z"`), cause.OrderMalformed},
		"a name with a line break, signed so":        {order.Destroy, both, nil, repack(both, `"shop"`, `"shop\n"`), cause.OrderMalformed},
		"a boot id that is none, signed so":          {order.Destroy, both, nil, repack(both, boot, `boot`), cause.OrderMalformed},
		"an instance id with a space, signed so":     {order.Destroy, both, nil, repack(both, `"i-1"`, `"i 1"`), cause.OrderMalformed},
		"a destroy that names a digest, signed so":   {order.Destroy, both, nil, repack(both, `"carries":""`, `"carries":"sha256:`+strings.Repeat("0", 64)+`"`), cause.OrderMalformed},
		"an upgrade that names no digest, signed so": {order.Upgrade, both, nil, repack(both, order.Digest(carried), ``), cause.OrderMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			o := good(tc.operation)
			if tc.change != nil {
				tc.change(&o)
			}
			var with []byte
			if tc.operation == order.Upgrade {
				with = slices.Clone(carried)
			}
			d := sign(t, o, with, tc.signer)
			if tc.spoil != nil {
				tc.spoil(d)
			}
			got, err := d.Verify(tc.operation, receiver, now)
			if cause.Of(err) != tc.code {
				t.Fatalf("%v, expected %q", err, tc.code)
			}
			if err == nil && (got.Challenge != o.Challenge || got.Operation != tc.operation) {
				t.Errorf("%+v", got)
			}
		})
	}
	t.Run("an order that is sent as another operation", func(t *testing.T) {
		d := sign(t, good(order.Destroy), nil, both)
		if _, err := d.Verify(order.Upgrade, receiver, now); cause.Of(err) != cause.OrderOperation {
			t.Error(err)
		}
	})
	t.Run("a policy without order keys takes none", func(t *testing.T) {
		r := receiver
		r.Keys = nil
		if _, err := sign(t, good(order.Destroy), nil, both).Verify(order.Destroy, r, now); cause.Of(err) != cause.OrderSignature {
			t.Error(err)
		}
	})
	t.Run("an instance without an id takes its orders without one", func(t *testing.T) {
		r, o := receiver, good(order.Destroy)
		r.InstanceID, o.InstanceID = "", ""
		if _, err := sign(t, o, nil, both).Verify(order.Destroy, r, now); err != nil {
			t.Error(err)
		}
	})
}

// strip takes the signatures off.
func strip(d *order.Document) {
	e, _ := dsse.Parse(d.Order)
	e.Signatures = nil
	d.Order, _ = e.Marshal()
}

// retype signs the same payload under another type.
func retype(k *dssetest.Key) func(*order.Document) {
	return func(d *order.Document) {
		e, _ := dsse.Parse(d.Order)
		d.Order, _ = dsse.Sign(policy.PayloadType, e.Payload, k)
	}
}

// repack signs a changed payload.
func repack(k *dssetest.Key, old, new string) func(*order.Document) {
	return func(d *order.Document) {
		e, _ := dsse.Parse(d.Order)
		changed := strings.Replace(string(e.Payload), old, new, 1)
		if changed == string(e.Payload) {
			panic("nothing changed: " + old)
		}
		d.Order, _ = dsse.Sign(order.PayloadType, []byte(changed), k)
	}
}

func TestSignRefuses(t *testing.T) {
	k := dssetest.New(t, "ecdsa")
	for name, tc := range map[string]struct {
		o       order.Order
		carried []byte
		code    cause.Code
	}{
		"an upgrade that carries nothing":  {good(order.Upgrade), nil, cause.OrderMalformed},
		"a destroy that carries something": {good(order.Destroy), []byte("x"), cause.OrderMalformed},
		"what is too large":                {good(order.Upgrade), make([]byte, order.MaxCarried+1), cause.PolicyTooLarge},
		"an order to nobody":               {order.Order{Operation: order.Destroy}, nil, cause.OrderMalformed},
	} {
		if _, err := order.Sign(tc.o, tc.carried, k); cause.Of(err) != tc.code {
			t.Errorf("%s: %v, expected %s", name, err, tc.code)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		in   string
		code cause.Code
	}{
		"an unknown member":      {`{"order":{},"x":1}`, cause.OrderMalformed},
		"a duplicate member":     {`{"order":{},"order":{}}`, cause.OrderMalformed},
		"no envelope":            {`{"carries":"AA=="}`, cause.OrderUnsigned},
		"a policy as it is":      {`{"payloadType":"x","payload":"","signatures":[]}`, cause.OrderMalformed},
		"a large envelope":       {`{"order":"` + strings.Repeat("x", 64<<10) + `"}`, cause.OrderMalformed},
		"something that is deep": {`{"order":` + strings.Repeat("[", 100) + strings.Repeat("]", 100) + `}`, cause.OrderMalformed},
		"nothing":                {``, cause.OrderMalformed},
	} {
		if _, err := order.Parse([]byte(tc.in)); cause.Of(err) != tc.code {
			t.Errorf("%s: %v, expected %s", name, err, tc.code)
		}
	}
}

// The signed bytes are an interface: others make orders too.
func TestPayload(t *testing.T) {
	d := sign(t, good(order.Destroy), nil, dssetest.New(t, "ecdsa"))
	e, err := dsse.Parse(d.Order)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"apiVersion":"cvm-agent.order/v1","bootID":"` + boot + `","carries":"","challenge":"` + strings.Repeat("ab", 32) +
		`","expires":"2026-03-04T05:16:07Z","instanceID":"i-1","operation":"destroy","policy":"shop"}`
	if string(e.Payload) != want || e.PayloadType != "application/vnd.cvm-agent.order.v1+json" {
		t.Errorf("%s %s", e.PayloadType, e.Payload)
	}
}

func FuzzOrder(f *testing.F) {
	k := dssetest.New(f, "ecdsa")
	for operation, carried := range map[string][]byte{order.Upgrade: []byte("policy"), order.Destroy: nil} {
		data, err := order.Sign(good(operation), carried, k)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte(`{"order":{"payloadType":"application/vnd.cvm-agent.order.v1+json","payload":"e30=","signatures":[]}}`))
	r := order.Receiver{Policy: "shop", InstanceID: "i-1", BootID: boot, Keys: []policy.OrderKey{{Key: k.PEM, Orders: []string{"destroy"}}}}
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := order.Parse(data)
		if err != nil {
			return
		}
		if o, err := d.Peek(); err == nil {
			again, err := json.Marshal(o)
			if err != nil || !bytes.Contains(again, []byte(o.Challenge)) {
				t.Fatalf("%s %v", again, err)
			}
		}
		if o, err := d.Verify(order.Destroy, r, now); err == nil && (o.Operation != order.Destroy || o.Policy != "shop" || len(d.Carries) != 0) {
			t.Fatalf("accepted %+v", o)
		}
	})
}
