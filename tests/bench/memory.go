package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// memoryRuns is how many launches the memory is taken in.
const memoryRuns = 2

// sampleEvery is the interval between two looks at the memory.
const sampleEvery = 50 * time.Millisecond

// memory is of one launch, in MiB of PSS: pages that processes share count
// once. The agent is its process with all descendants; podman, conmon and the
// workload belong to podman's service and do not count.
type memory struct {
	Peak    float64 // of the sum
	Agent   float64 // peak of the sum without cvm-sbom: the agent and its unpacking children
	Scanner float64 // peak of cvm-sbom by itself
	Idle    float64 // of the sum, some seconds after ready
}

// memory launches once on empty storage and watches.
func (b *bench) memory(ctx context.Context, p *published) (taken memory, err error) {
	g, err := b.guest(ctx)
	if err != nil {
		return taken, err
	}
	defer func() {
		g.Halt()
		err = errors.Join(err, b.discard(ctx, g.Podman, g.Dir))
	}()
	if err := g.Boot(ctx, p.initdata); err != nil {
		return taken, err
	}
	var watching sync.WaitGroup
	ready := make(chan struct{})
	watch := func(pid int) {
		watching.Go(func() {
			for {
				agent, scanner := pss(pid)
				taken.Peak, taken.Agent, taken.Scanner = max(taken.Peak, agent+scanner), max(taken.Agent, agent), max(taken.Scanner, scanner)
				select {
				case <-ready:
					return
				case <-time.After(sampleEvery):
				}
			}
		})
	}
	_, err = b.launch(ctx, g, watch)
	close(ready)
	watching.Wait()
	if err != nil {
		return taken, err
	}
	select {
	case <-ctx.Done():
		return taken, ctx.Err()
	case <-time.After(b.idle):
	}
	if !g.Agent.Running() {
		return taken, fmt.Errorf("the agent ended: %s", lastLines(g.Agent.Output(), 3))
	}
	agent, scanner := pss(g.Agent.PID())
	taken.Idle = agent + scanner
	return taken, nil
}

// pss sums the proportional set sizes of a process and its descendants, in MiB,
// those of cvm-sbom apart. Processes that end meanwhile count as zero.
func pss(root int) (agent, scanner float64) {
	parents := map[int]int{}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, 0
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if fields := statOf(pid); len(fields) > 1 {
			parents[pid], _ = strconv.Atoi(fields[1])
		}
	}
	for pid := range parents {
		for up := pid; up > 0; up = parents[up] {
			if up != root {
				continue
			}
			if size := pssOf(pid); name(pid) == "cvm-sbom" {
				scanner += size
			} else {
				agent += size
			}
			break
		}
	}
	return agent, scanner
}

func name(pid int) string {
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(comm))
}

func pssOf(pid int) float64 {
	file, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); len(fields) == 3 && fields[0] == "Pss:" {
			kib, err := strconv.ParseFloat(fields[1], 64)
			if err != nil {
				return 0
			}
			return kib / 1024
		}
	}
	return 0
}
