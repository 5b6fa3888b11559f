# cvm-agent. `make` lists the targets; every one visits both Go modules
# (the root, and agent/cmd/cvm-sbom, which alone links the SBOM scanner).

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help deps build broker-pkcs11 test race lint fuzz bench demo clean \
	image image-debug image-check image-repro image-lock deps-vm e2e

# Static binaries without cgo. The tags are the same everywhere, so that builds,
# tests and the linter share one cache: an OpenPGP without gpgme, podman's
# bindings without a local engine, no btrfs headers when the race detector
# brings cgo in.
export CGO_ENABLED := 0
export GOFLAGS := -buildvcs=false -trimpath -tags=containers_image_openpgp,remote,exclude_graphdriver_btrfs

CVM_TOOLS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/cvm-agent/tools
export CVM_TOOLS

VERSION := $(or $(shell git describe --tags --always --dirty 2>/dev/null),unknown)
# The one thing that needs cgo: a vendor's PKCS #11 library is loaded at run time.
WITH_PKCS11 := CGO_ENABLED=1 GOFLAGS='$(GOFLAGS),pkcs11'
LDFLAGS := -s -w -X main.version=$(VERSION)

SBOM_MODULE := agent/cmd/cvm-sbom
PROGRAMS := initrd/cmd/cvm-early agent/cmd/cvm-agent policy/cmd/cvm-broker image-build/cmd/cvmctl

# Light packages with concurrency in them. The race detector needs cgo and
# triples the cost, so the heavy image packages stay out.
RACE := ./agent/control/... ./agent/eventlog/... ./agent/keyrelease/... ./agent/launch/... ./agent/platform/... ./policy/broker/...

TESTFLAGS ?= -timeout 40m
FUZZTIME ?= 10s

# Tests and the demo mount, measure and run containers: they need root, the
# compiler does not.
ifneq ($(shell id -u),0)
AS_ROOT := sudo -E env PATH=$(PATH) HOME=$(HOME) TMPDIR=$(TMPDIR)
GO_TEST_EXEC := -exec "$(AS_ROOT)"
endif

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

deps: ## install what is missing: Debian packages, stock tools outside the tree
	@sh tests/deps.sh

build: ## the five programs, static and stripped, into bin/
	@sh tests/deps.sh go
	@mkdir -p bin
	go build -ldflags '$(LDFLAGS)' -o bin/ $(addprefix ./,$(PROGRAMS))
	cd $(SBOM_MODULE) && go build -ldflags '$(LDFLAGS)' -o $(CURDIR)/bin/cvm-sbom .

broker-pkcs11: ## cvm-broker and cvmctl with a KEK in a PKCS #11 token; needs cgo
	@sh tests/deps.sh go
	@mkdir -p bin
	$(WITH_PKCS11) go build -ldflags '$(LDFLAGS)' -o bin/cvm-broker-pkcs11 ./policy/cmd/cvm-broker
	$(WITH_PKCS11) go build -ldflags '$(LDFLAGS)' -o bin/cvmctl-pkcs11 ./image-build/cmd/cvmctl

demo: deps build ## the whole story on this machine, ends with "demo: ok"
	@go build -ldflags '-s -w' -o bin/cvm-demo ./tests/demo
	@$(AS_ROOT) bin/cvm-demo

test: deps build race ## all tests, against real podman, registry, swtpm and the stock tools
	cd $(SBOM_MODULE) && go test $(GO_TEST_EXEC) $(TESTFLAGS) ./...
	$(WITH_PKCS11) go test $(GO_TEST_EXEC) $(TESTFLAGS) ./policy/broker/kek
	go test $(GO_TEST_EXEC) $(TESTFLAGS) ./...

race: deps build ## the concurrent packages under the race detector
	CGO_ENABLED=1 go test $(GO_TEST_EXEC) -race $(TESTFLAGS) $(RACE)

lint: deps ## gofmt, go vet, golangci-lint with the layering rules
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { echo 'not gofmt-ed:'; gofmt -l $$(git ls-files '*.go'); exit 1; }
	go vet ./...
	$(WITH_PKCS11) go vet ./policy/broker/kek
	cd $(SBOM_MODULE) && go vet ./...
	$(CVM_TOOLS)/bin/golangci-lint run ./...
	cd $(SBOM_MODULE) && $(CVM_TOOLS)/bin/golangci-lint run ./...

fuzz: ## every fuzz target for FUZZTIME (default 10s)
	@sh tests/fuzz.sh $(FUZZTIME) . $(SBOM_MODULE)

bench: deps build ## every measured number beside its bar, in one run
	@go build -ldflags '-s -w' -o bin/cvm-bench ./tests/bench
	@$(AS_ROOT) bin/cvm-bench $(BENCHFLAGS)

# SIGNERS=FP,FP THRESHOLD=N FLOOR=N are the policy signers that the image
# trusts; KERNEL=backports takes the newer kernel that TDX needs.
IMAGE_SEAL = $(AS_ROOT) image-build/guest/build.sh seal --signers '$(SIGNERS)' --threshold $(or $(THRESHOLD),1) \
	--version-floor $(or $(FLOOR),1) $(if $(SCRATCH),--scratch $(SCRATCH))
export KERNEL

image: build ## the guest image into bin/image: SIGNERS=FP,FP [THRESHOLD=N FLOOR=N KERNEL=backports SCRATCH=disk]
	@sh tests/deps.sh image
	@$(IMAGE_SEAL) --out bin/image

image-debug: build ## its debug variant, measured as such, into bin/image-debug
	@sh tests/deps.sh image
	@$(IMAGE_SEAL) --debug --out bin/image-debug

image-check: ## tests of the built image: what can log in, what listens, what is enabled, what is in it
	@$(AS_ROOT) env GOFLAGS='$(GOFLAGS)' CGO_ENABLED=0 image-build/guest/check.sh $(or $(IMAGE),bin/image)

image-repro: ## builds everything twice, in two directories, and compares bit for bit
	@sh tests/deps.sh image
	@VERSION='$(VERSION)' $(AS_ROOT) image-build/guest/repro.sh

image-lock: ## take the mirror's present versions into image-build/guest/packages.lock
	@sh tests/deps.sh image
	@image-build/guest/build.sh lock

# Of the stock tools, a boot needs two: the others take minutes to build.
deps-vm:
	@sh tests/deps.sh apt
	@sh tests/deps.sh tools registry cosign
	@sh tests/deps.sh vm

e2e: deps-vm build ## the guest image booted in QEMU: its whole life, and what it refuses; ends with "e2e: N/N"
	@go build -ldflags '-s -w' -o bin/cvm-e2e ./tests/e2e
	@$(AS_ROOT) bin/cvm-e2e $(E2EFLAGS)

clean: ## remove bin/
	rm -rf bin
