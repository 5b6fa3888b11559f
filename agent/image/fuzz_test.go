package image

import "testing"

func FuzzManifest(f *testing.F) {
	f.Add([]byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":2},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip+encrypted","digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":1}]}`))
	f.Add([]byte(`{"schemaVersion":2,"manifests":[{"mediaType":"m","digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":2,"platform":{"os":"linux","architecture":"amd64"}}]}`))
	f.Add([]byte(`{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":["sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"]}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if d, err := pickPlatform(raw, "amd64"); err == nil && d != "" && d.Validate() != nil {
			t.Errorf("picked %q", d)
		}
		if m, err := parseManifest(raw); err == nil {
			for _, l := range append(m.Layers, m.Config) {
				if l.Digest.Validate() != nil || l.Size < 0 {
					t.Errorf("accepted %+v", l)
				}
			}
		}
		if ids, err := parseConfig(raw, "amd64", 1); err == nil && len(chainIDs(ids)) != 1 {
			t.Error("wrong number of diff IDs")
		}
	})
}
