package broker

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/broker/kek"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// The files that Init makes in its directory.
const (
	FileConfig     = "config.yaml"
	FileCA         = "ca.pem"    // TLS root for policies (broker.tlsRoots) and admins (--ca)
	FileTokenPub   = "token.pub" // PEM SPKI for policies (broker.tokenKeys)
	fileDSN        = "postgres.dsn"
	FileAdminToken = "admin.token" // bearer token for admins, 0600; move it to them and delete it here
)

// tlsLife is the life of the certificates that Init makes.
const tlsLife = 5 * 365 * 24 * time.Hour

// InitOptions is what Init cannot choose by itself.
type InitOptions struct {
	Dir     string
	Hosts   []string     // DNS names and IP addresses in the server certificate, at least one
	Listen  string       // host:port
	EKRoots []RootConfig // written to the configuration
	Name    string       // of the broker, in audit records; needed with Join
	DSNFile string       // file with a PostgreSQL DSN, which is copied; "": embedded storage
	Join    string       // directory of another broker whose database, keys and certificate are shared
	Now     time.Time
}

// Init makes a directory with everything that a broker needs: KEK, TLS root
// and server certificate, token key, admin token and configuration. It never
// replaces a file. The TLS root's key signs one certificate and is forgotten.
func Init(o InitOptions) error {
	if o.Join != "" && (len(o.Hosts) > 0 || len(o.EKRoots) > 0 || o.DSNFile != "") {
		return cause.New(cause.Usage, "--join takes hosts, EK roots and database from the other broker")
	}
	if o.Join == "" && len(o.Hosts) == 0 {
		return cause.New(cause.Usage, "name at least one --host")
	}
	if o.Join != "" {
		return join(o)
	}
	if _, err := new(Config).roots("--ek-root", o.EKRoots); err != nil {
		return err // what serve would refuse
	}
	files := map[string]file{}
	key := make([]byte, kek.Size)
	rand.Read(key)
	files["kek"] = file{key, 0o600}
	if err := addTLS(files, o); err != nil {
		return cause.Wrap(cause.Internal, err)
	}
	if err := addTokenKey(files); err != nil {
		return cause.Wrap(cause.Internal, err)
	}
	secret := make([]byte, 32)
	rand.Read(secret)
	token := base64.RawURLEncoding.EncodeToString(secret)
	sum := sha256.Sum256([]byte(token))
	files[FileAdminToken] = file{[]byte(token + "\n"), 0o600}
	files["admin.sha256"] = file{[]byte(hex.EncodeToString(sum[:]) + "\n"), 0o600}

	c := Config{
		Name:             o.Name,
		Listen:           o.Listen,
		TLS:              TLSFiles{Certificate: "tls.pem", Key: "tls.key"},
		Storage:          "broker.db",
		KEK:              KEKSource{File: "kek"},
		TokenKey:         "token.key",
		AdminTokenHashes: "admin.sha256",
		AuditLog:         "audit.ndjson",
		EKRoots:          o.EKRoots,
	}
	if o.DSNFile != "" {
		dsn, err := bounded.ReadSecret(o.DSNFile, maxDSN)
		if err != nil {
			return cause.Wrap(cause.Usage, err)
		}
		files[fileDSN] = file{dsn, 0o600}
		c.Storage, c.Postgres = "", &PostgresConfig{DSNFile: fileDSN}
	}
	return writeDir(o.Dir, c, files)
}

type file struct {
	data []byte
	mode os.FileMode
}

func (f file) write(path string) error {
	w, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, f.mode)
	if err != nil {
		return cause.Wrap(cause.StorageFailed, err)
	}
	_, err = w.Write(f.data)
	if err == nil {
		err = w.Sync()
	}
	if cerr := w.Close(); err == nil {
		err = cerr
	}
	return cause.Wrap(cause.StorageFailed, err)
}

func addTokenKey(files map[string]file) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return err
	}
	files["token.key"] = file{encodePEM("PRIVATE KEY", private), 0o600}
	files[FileTokenPub] = file{encodePEM("PUBLIC KEY", public), 0o644}
	return nil
}

func addTLS(files map[string]file, o InitOptions) error {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	ca := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{CommonName: "cvm-broker root"},
		NotBefore:             o.Now.Add(-time.Hour),
		NotAfter:              o.Now.Add(tlsLife),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	leaf := &x509.Certificate{
		SerialNumber: serial(),
		Subject:      pkix.Name{CommonName: "cvm-broker"},
		NotBefore:    ca.NotBefore,
		NotAfter:     ca.NotAfter,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, h := range o.Hosts {
		if ip := net.ParseIP(h); ip != nil {
			leaf.IPAddresses = append(leaf.IPAddresses, ip)
		} else if h != "" && !strings.ContainsAny(h, ":/ \t\n") {
			leaf.DNSNames = append(leaf.DNSNames, h)
		} else {
			return cause.New(cause.Usage, "--host %q is neither a DNS name nor an IP address", h)
		}
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	if err != nil {
		return err
	}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, ca, &key.PublicKey, caKey)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	files[FileCA] = file{encodePEM("CERTIFICATE", caDER), 0o644}
	files["tls.pem"] = file{encodePEM("CERTIFICATE", leafDER), 0o644}
	files["tls.key"] = file{encodePEM("PRIVATE KEY", private), 0o600}
	return nil
}

func serial() *big.Int {
	b := make([]byte, 16)
	rand.Read(b)
	b[0] &= 0x7f
	return new(big.Int).SetBytes(b)
}

func encodePEM(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// ParseRootFlag reads NAME=PATH.
func ParseRootFlag(s string) (RootConfig, error) {
	name, path, ok := strings.Cut(s, "=")
	if !ok || name == "" || path == "" {
		return RootConfig{}, cause.New(cause.Usage, "--ek-root %q is not NAME=PATH", s)
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return RootConfig{}, cause.Wrap(cause.Usage, fmt.Errorf("--ek-root: %w", err))
	}
	return RootConfig{Name: name, Paths: []string{abs}}, nil
}
