package measure

import (
	"encoding/hex"
	"encoding/json"
	"os"
	"testing"
)

// A recorded guest of Azure has no driver beside its firmware's.
func TestPCR2AsRecordedOnAzure(t *testing.T) {
	data, err := os.ReadFile("../../policy/appraisal/testdata/trustee-az-snp-vtpm-evidence-v2.json")
	if err != nil {
		t.Fatal(err)
	}
	var recorded struct {
		Quote struct {
			PCRs []string `json:"pcrs"`
		} `json:"tpm_quote"`
	}
	if err := json.Unmarshal(data, &recorded); err != nil || len(recorded.Quote.PCRs) != 24 {
		t.Fatalf("%d PCRs, %v", len(recorded.Quote.PCRs), err)
	}
	if got := hex.EncodeToString(pcr2()); got != recorded.Quote.PCRs[2] {
		t.Errorf("PCR 2 is %s, recorded was %s", got, recorded.Quote.PCRs[2])
	}
}

func TestPCR2IsThirtyTwoBytes(t *testing.T) {
	if _, err := PCRs(parseUKI(t, ukiFile(t)), PCRConfig{PCR2: []byte{1}}); err == nil {
		t.Error("a PCR of one byte was accepted")
	}
}
