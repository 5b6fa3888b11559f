//go:build pkcs11

package kek

import (
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// wrapContext is the additional data of a wrapped data key: a token key that
// also serves others gives nothing of theirs away as one of ours.
var wrapContext = []byte("cvm-broker/v1 data key")

const (
	ivSize  = 12
	tagSize = 16
)

// tokenSource wraps with AES-GCM inside the token: C_Encrypt and C_Decrypt,
// which more tokens allow than unwrapping into an extractable object.
type tokenSource struct {
	c   PKCS11
	pin string
}

func openToken(c PKCS11, pin string) (Source, error) {
	t := &tokenSource{c, pin}
	// Fail at the start, not at the first use.
	return t, t.with(func(ctx *pkcs11.Ctx, s pkcs11.SessionHandle) error {
		_, err := t.find(ctx, s)
		return err
	})
}

// with runs f in a logged-in session. A broker needs the token at its start
// alone, so nothing stays loaded.
func (t *tokenSource) with(f func(*pkcs11.Ctx, pkcs11.SessionHandle) error) error {
	fail := func(what string, err error) error {
		return cause.New(cause.Config, "kek.pkcs11: %s: %w", what, err)
	}
	ctx := pkcs11.New(t.c.Module)
	if ctx == nil {
		return fail("module", fmt.Errorf("%s cannot be loaded", t.c.Module))
	}
	defer ctx.Destroy()
	if err := ctx.Initialize(); err != nil {
		return fail("module", err)
	}
	defer func() { _ = ctx.Finalize() }()
	slot, err := t.slot(ctx)
	if err != nil {
		return fail("token", err)
	}
	s, err := ctx.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return fail("token", err)
	}
	defer func() { _ = ctx.CloseSession(s) }()
	if err := ctx.Login(s, pkcs11.CKU_USER, t.pin); err != nil {
		return fail("PIN", err)
	}
	defer func() { _ = ctx.Logout(s) }()
	if err := f(ctx, s); err != nil {
		return fail("key "+t.c.Key, err)
	}
	return nil
}

// slot finds the one token of the label.
func (t *tokenSource) slot(ctx *pkcs11.Ctx) (found uint, err error) {
	slots, err := ctx.GetSlotList(true)
	if err != nil {
		return 0, err
	}
	n := 0
	for _, s := range slots {
		info, err := ctx.GetTokenInfo(s)
		if err == nil && strings.TrimRight(info.Label, " \x00") == t.c.Token {
			found, n = s, n+1
		}
	}
	if n != 1 {
		return 0, fmt.Errorf("%d tokens have the label %q, expected 1", n, t.c.Token)
	}
	return found, nil
}

func (t *tokenSource) template() []*pkcs11.Attribute {
	return []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, t.c.Key),
	}
}

// find returns the one key of the label, which must be one that cannot be
// taken out of the token.
func (t *tokenSource) find(ctx *pkcs11.Ctx, s pkcs11.SessionHandle) (pkcs11.ObjectHandle, error) {
	list, err := t.objects(ctx, s)
	if err != nil {
		return 0, err
	}
	if len(list) != 1 {
		return 0, fmt.Errorf("%d AES keys have the label, expected 1", len(list))
	}
	a, err := ctx.GetAttributeValue(s, list[0], []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, nil), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, nil),
	})
	if err != nil {
		return 0, err
	}
	if !isTrue(a[0].Value) || isTrue(a[1].Value) {
		return 0, errors.New("the key can be taken out of the token: expected CKA_SENSITIVE and not CKA_EXTRACTABLE")
	}
	return list[0], nil
}

func isTrue(v []byte) bool { return len(v) == 1 && v[0] != 0 }

func (t *tokenSource) objects(ctx *pkcs11.Ctx, s pkcs11.SessionHandle) ([]pkcs11.ObjectHandle, error) {
	if err := ctx.FindObjectsInit(s, t.template()); err != nil {
		return nil, err
	}
	list, _, err := ctx.FindObjects(s, 2)
	return list, errors.Join(err, ctx.FindObjectsFinal(s))
}

// DataKey makes a random key and wraps it, or unwraps the kept one.
func (t *tokenSource) DataKey(kept []byte) (key, keep []byte, err error) {
	err = t.with(func(ctx *pkcs11.Ctx, s pkcs11.SessionHandle) error {
		o, err := t.find(ctx, s)
		if err != nil {
			return err
		}
		if kept != nil {
			key, err = unwrap(ctx, s, o, kept)
			return err
		}
		key = make([]byte, Size)
		rand.Read(key)
		keep, err = wrap(ctx, s, o, key)
		return err
	})
	if err != nil {
		clear(key)
		return nil, nil, err
	}
	return key, keep, nil
}

// wrap returns IV, ciphertext and tag.
func wrap(ctx *pkcs11.Ctx, s pkcs11.SessionHandle, o pkcs11.ObjectHandle, key []byte) ([]byte, error) {
	iv := make([]byte, ivSize)
	rand.Read(iv)
	p := pkcs11.NewGCMParams(iv, wrapContext, tagSize*8)
	defer p.Free()
	if err := ctx.EncryptInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, p)}, o); err != nil {
		return nil, err
	}
	sealed, err := ctx.Encrypt(s, key)
	if err != nil {
		return nil, err
	}
	if used := p.IV(); len(used) == ivSize { // some tokens insist on an IV of their own
		iv = used
	}
	return slices.Concat(iv, sealed), nil
}

func unwrap(ctx *pkcs11.Ctx, s pkcs11.SessionHandle, o pkcs11.ObjectHandle, kept []byte) ([]byte, error) {
	if len(kept) != ivSize+Size+tagSize {
		return nil, fmt.Errorf("the wrapped data key has %d bytes, expected %d", len(kept), ivSize+Size+tagSize)
	}
	p := pkcs11.NewGCMParams(kept[:ivSize], wrapContext, tagSize*8)
	defer p.Free()
	if err := ctx.DecryptInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, p)}, o); err != nil {
		return nil, err
	}
	key, err := ctx.Decrypt(s, kept[ivSize:])
	if err != nil {
		return nil, fmt.Errorf("the wrapped data key is not of this key: %w", err)
	}
	if len(key) != Size {
		return nil, fmt.Errorf("the data key has %d bytes, expected %d", len(key), Size)
	}
	return key, nil
}

// CreateTokenKey makes the AES-256 key object that c names, one that cannot be
// taken out of the token. A label that is taken is left alone.
func CreateTokenKey(c Config, credentials string) error {
	if c.PKCS11 == nil {
		return cause.New(cause.Usage, "no PKCS #11 token is named")
	}
	if err := c.Validate(); err != nil {
		return cause.Wrap(cause.Usage, err)
	}
	pin, err := secret(c.PKCS11.PINFile, c.PKCS11.PINCredential, credentials, 1<<10)
	if err != nil {
		return cause.New(cause.Config, "kek.pkcs11: PIN: %w", err)
	}
	t := &tokenSource{*c.PKCS11, strings.TrimRight(string(pin), "\r\n")}
	return t.with(func(ctx *pkcs11.Ctx, s pkcs11.SessionHandle) error {
		list, err := t.objects(ctx, s)
		if err != nil {
			return err
		}
		if len(list) > 0 {
			return errors.New("there is one already: nothing was changed")
		}
		_, err = ctx.GenerateKey(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, append(t.template(),
			pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, Size),
			pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
			pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
			pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
			pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, true),
			pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true),
		))
		return err
	})
}
