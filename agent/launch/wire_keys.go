package launch

import (
	"context"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/keyrelease"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

func (r real) Broker(v *policy.Verified, initdata []byte, p Platform, l Log) (Broker, error) {
	tpm, ok := p.(*tpmPlatform)
	if !ok || tpm.attester == nil {
		return nil, cause.New(cause.Internal, "no attester for the broker")
	}
	config := keyrelease.Config{Broker: *v.Policy.Broker, Initdata: initdata, EventLog: l.Bytes, Attester: tpm.attester, Logger: r.logger}
	if _, err := keyrelease.New(config); err != nil { // says now what is wrong with the policy's keys
		return nil, err
	}
	return broker{config}, nil
}

type broker struct{ config keyrelease.Config }

func (b broker) Attest(ctx context.Context, onWait func(error, time.Duration)) (Session, error) {
	config := b.config
	config.OnWait = onWait
	client, err := keyrelease.New(config)
	if err != nil {
		return nil, err
	}
	s, err := client.Attest(ctx)
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
