package policy

import "slices"

// ChooseMirrors returns registries with the mirrors that a site chose from the
// policy's, by registry host and in the order in which they are to be tried; a
// registry that chosen does not name keeps all. What the policy does not allow
// is left out, and returned as refused: HOST, or HOST: MIRROR.
func ChooseMirrors(registries []Registry, chosen map[string][]string) (out []Registry, refused []string) {
	known := map[string]bool{}
	for _, r := range registries {
		known[r.Host] = true
		if mirrors, there := chosen[r.Host]; there {
			allowed := r.Mirrors
			r.Mirrors = nil
			for _, m := range mirrors {
				if slices.Contains(allowed, m) {
					r.Mirrors = append(r.Mirrors, m)
				} else {
					refused = append(refused, r.Host+": "+m)
				}
			}
		}
		out = append(out, r)
	}
	for host := range chosen {
		if !known[host] {
			refused = append(refused, host)
		}
	}
	slices.Sort(refused)
	return out, refused
}
