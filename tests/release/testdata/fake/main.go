// Command fake is what no release may be: a program with a made attestation
// chain inside. The test looks for it with the same eyes as for the products.
package main

import (
	"fmt"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/snptest"
)

func main() {
	testing.Init()
	fmt.Println(len(snptest.New(nil, snptest.Config{}).Roots()))
}
