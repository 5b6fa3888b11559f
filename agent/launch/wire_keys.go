package launch

import (
	"context"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/keyrelease"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

func (r real) Broker(v *policy.Verified, initdata []byte, p Platform, l Log) (Broker, error) {
	guest, ok := p.(*guestPlatform)
	if !ok {
		return nil, cause.New(cause.Internal, "no attester for the broker")
	}
	attester, err := guest.attester(v.Policy)
	if err != nil {
		return nil, err
	}
	config := keyrelease.Config{Broker: *v.Policy.Broker, Initdata: initdata, EventLog: l.Bytes, Attester: attester, Logger: r.logger}
	client, err := keyrelease.New(config)
	if err != nil {
		return nil, err
	}
	return broker{client}, nil
}

// broker keeps one client, which remembers the URL that answered last.
type broker struct{ client *keyrelease.Client }

func (b broker) Attest(ctx context.Context, onWait func(error, time.Duration)) (Session, error) {
	s, err := b.client.WithWait(onWait).Attest(ctx)
	if err != nil {
		return nil, err
	}
	return session{s}, nil
}

type session struct{ *keyrelease.Session }

func (s session) Claims() Claims {
	t := s.Token()
	return Claims{HasMark: t.HasMark, PolicyName: t.PolicyName, VersionMark: t.VersionMark, Signers: t.Signers,
		InstanceID: t.InstanceID, Tombstone: t.Tombstone, IssuedAt: t.IssuedAt}
}
