// Command guest is the only program of the test images: a workload that says
// what it can see.
package main

import (
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"
)

func main() {
	switch os.Args[1] {
	case "serve": // serve ADDR
		http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "hello") })
		http.HandleFunc("/secret", func(w http.ResponseWriter, r *http.Request) {
			b, err := os.ReadFile("/run/secrets/" + r.URL.Query().Get("name"))
			fmt.Fprintf(w, "%s %v", b, err)
		})
		http.HandleFunc("/write", func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, os.WriteFile(r.URL.Query().Get("path"), []byte("x"), 0o600))
		})
		http.HandleFunc("/status", func(w http.ResponseWriter, _ *http.Request) {
			b, _ := os.ReadFile("/proc/self/status")
			w.Write(b)
		})
		http.HandleFunc("/mounts", func(w http.ResponseWriter, _ *http.Request) {
			b, _ := os.ReadFile("/proc/self/mounts")
			w.Write(b)
		})
		http.HandleFunc("/env", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, strings.Join(os.Environ(), "\n")) })
		http.HandleFunc("/broken", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) })
		fmt.Println(http.ListenAndServe(os.Args[2], nil))
	case "die": // die TEXT
		fmt.Println(os.Args[2])
		os.Exit(7)
	case "check": // check CODE
		var code int
		fmt.Sscan(os.Args[2], &code)
		os.Exit(code)
	case "sleep":
		time.Sleep(time.Hour)
	}
}
