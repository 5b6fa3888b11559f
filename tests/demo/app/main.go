// Command app is the workload of the examples: an HTTP server that says which
// image it came from. All it answers is read from files of the image, and
// from /run/secrets when the policy gave it any.
package main

import (
	"fmt"
	"log"
	"net/http"
	"os"
	"strings"
	"time"
)

func main() {
	if len(os.Args) != 2 {
		log.Fatal("usage: server ADDRESS")
	}
	http.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		file(w, "/srv/greeting")
	})
	http.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		health, err := os.ReadFile("/srv/health")
		if err != nil || strings.TrimSpace(string(health)) != "ok" {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		fmt.Fprintf(w, "%s", health)
	})
	// Only says how long a secret is: a demo that printed one would be no example.
	http.HandleFunc("GET /secrets/{name}", func(w http.ResponseWriter, r *http.Request) {
		secret, err := os.ReadFile("/run/secrets/" + r.PathValue("name"))
		if err != nil {
			http.NotFound(w, r)
			return
		}
		fmt.Fprintf(w, "%d bytes\n", len(secret))
	})
	server := &http.Server{Addr: os.Args[1], ReadHeaderTimeout: 5 * time.Second}
	log.Fatal(server.ListenAndServe())
}

func file(w http.ResponseWriter, name string) {
	data, err := os.ReadFile(name)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	_, _ = w.Write(data)
}
