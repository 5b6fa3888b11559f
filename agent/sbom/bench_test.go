package sbom

import (
	"context"
	"os"
	"testing"
)

// BenchmarkScan scans the root that CVM_BENCH_ROOT names, in the sandbox.
func BenchmarkScan(b *testing.B) {
	root := os.Getenv("CVM_BENCH_ROOT")
	if root == "" {
		root = "testdata"
	}
	program, err := cvmSBOM()
	if err != nil {
		b.Fatal(err)
	}
	s := &Sandbox{Program: program}
	for b.Loop() {
		out, err := s.Scan(context.Background(), root, ScanOptions{Name: "image"})
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(len(out)), "bytes/document")
	}
}

// BenchmarkCompare compares the largest recorded document with itself.
func BenchmarkCompare(b *testing.B) {
	doc, err := os.ReadFile("testdata/registry-all-1.57.0.spdx.json")
	if err != nil {
		b.Fatal(err)
	}
	if path := os.Getenv("CVM_BENCH_SBOM"); path != "" {
		if doc, err = os.ReadFile(path); err != nil {
			b.Fatal(err)
		}
	}
	b.SetBytes(int64(len(doc)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Compare(doc, doc, Strict); err != nil {
			b.Fatal(err)
		}
	}
}
