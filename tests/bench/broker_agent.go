package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	sev "github.com/google/go-sev-guest/client"

	"github.com/cc-runtime/cvm-agent/agent/keyrelease"
	"github.com/cc-runtime/cvm-agent/agent/platform"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/snptest"
	"github.com/cc-runtime/cvm-agent/policy/broker"
)

// madeDevice is /dev/sev-guest of a made chip. It knows how long the kernel,
// the firmware and the host would have been at work: that time is not the
// agent's.
type madeDevice struct {
	*snptest.Device
	took *atomic.Int64 // ns
}

func (d madeDevice) Ioctl(command uintptr, arg any) (uintptr, error) {
	defer func(began time.Time) { d.took.Add(int64(time.Since(began))) }(time.Now())
	return d.Device.Ioctl(command, arg)
}

// onlySEV are the files of a guest with that device and nothing else.
type onlySEV struct{}

func (onlySEV) Exists(path string) bool            { return path == "/dev/sev-guest" }
func (onlySEV) Read(string, int64) ([]byte, error) { return nil, os.ErrNotExist }
func (onlySEV) Write(string, []byte) error         { return os.ErrNotExist }

// agents has the agent's own code attest so many guests, each with a new
// client as after a boot, and get the key. The times are of one guest each, in
// ms: from the first look at the policy's broker to the decrypted key, but for
// the hardware. An idle broker's share is in them.
func (f *fleet) agents(ctx context.Context, p *brokerProcess, guests int) ([]float64, error) {
	ca, err := os.ReadFile(filepath.Join(p.dir, broker.FileCA))
	if err != nil {
		return nil, err
	}
	token, err := os.ReadFile(filepath.Join(p.dir, broker.FileTokenPub))
	if err != nil {
		return nil, err
	}
	at := policy.Broker{URL: "https://" + p.address, TLSRoots: []string{string(ca)}, TokenKeys: []string{string(token)}}
	var list []float64
	for range guests {
		var hardware atomic.Int64
		id := make([]byte, 32)
		_, _ = rand.Read(id)
		device := madeDevice{&snptest.Device{Chain: f.chain, Options: f.options(id)}, &hardware}
		guest, err := platform.Open(ctx, platform.Hardware{Files: onlySEV{}, SEV: func(string) (sev.Device, error) { return device, nil }}, platform.Options{})
		if err != nil {
			return nil, err
		}
		attester, err := guest.Choose([]policy.Platform{policy.PlatformSNP}, 0)
		if err != nil {
			return nil, err
		}
		began := time.Now()
		if err := f.getKey(ctx, keyrelease.Config{Broker: at, Initdata: f.initdata, EventLog: func() []byte { return f.log }, Attester: attester}); err != nil {
			return nil, err
		}
		list = append(list, milliseconds(time.Since(began)-time.Duration(hardware.Load())))
	}
	return list, nil
}

func (f *fleet) getKey(ctx context.Context, c keyrelease.Config) error {
	client, err := keyrelease.New(c)
	if err != nil {
		return err
	}
	session, err := client.Attest(ctx)
	if err != nil {
		return err
	}
	defer session.Close()
	key, err := session.Resource(ctx, fleetResource)
	if err == nil && !bytes.Equal(key, fleetKey) {
		err = errors.New("the agent got another key than was stored")
	}
	return err
}
