package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// keys names the files of keys and certificates.
type keys struct {
	authority, serverCertificate, serverKey, adminCertificate, adminKey string
	// The key that signs the tokens of service accounts.
	accounts string
}

// makeKeys makes all keys and certificates, or takes those that an earlier start has made: what clients were given then
// stays good.
func makeKeys(dir, address string) (*keys, error) {
	in := func(name string) string { return filepath.Join(dir, name) }
	k := &keys{
		authority:         in("ca.crt"),
		serverCertificate: in("server.crt"),
		serverKey:         in("server.key"),
		adminCertificate:  in("admin.crt"),
		adminKey:          in("admin.key"),
		accounts:          in("accounts.key"),
	}
	if _, err := os.Stat(k.accounts); !errors.Is(err, fs.ErrNotExist) {
		return k, err
	}
	authorityKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	authority := template("cluster", 1)
	authority.IsCA = true
	authority.BasicConstraintsValid = true
	authority.KeyUsage = x509.KeyUsageCertSign
	server := template("kube-apiserver", 2)
	server.IPAddresses = []net.IP{net.ParseIP(address)}
	server.DNSNames = []string{"kubernetes.default.svc"}
	server.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	admin := template("admin", 3)
	// The group that may do everything.
	admin.Subject.Organization = []string{"system:masters"}
	admin.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	sign := func(certificate *x509.Certificate, key crypto.Signer, file string) error {
		der, err := x509.CreateCertificate(rand.Reader, certificate, authority, key.Public(), authorityKey)
		if err != nil {
			return err
		}
		return writePEM(file, "CERTIFICATE", der)
	}
	issue := func(certificate *x509.Certificate, file, keyFile string) error {
		key, err := writeKey(keyFile)
		if err != nil {
			return err
		}
		return sign(certificate, key, file)
	}
	if err := sign(authority, authorityKey, k.authority); err != nil {
		return nil, err
	}
	if err := issue(server, k.serverCertificate, k.serverKey); err != nil {
		return nil, err
	}
	if err := issue(admin, k.adminCertificate, k.adminKey); err != nil {
		return nil, err
	}
	// The last one: it says that all are there.
	_, err = writeKey(k.accounts)
	return k, err
}

func template(name string, serial int64) *x509.Certificate {
	return &x509.Certificate{
		Subject:      pkix.Name{CommonName: name},
		SerialNumber: big.NewInt(serial),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
	}
}

func writeKey(file string) (crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, err
	}
	return key, writePEM(file, "EC PRIVATE KEY", der)
}

func writePEM(file, kind string, der []byte) error {
	return os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

// writeKubeconfig writes the administrator's kubeconfig; gives its path.
func (k *keys) writeKubeconfig(s settings) (string, error) {
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: admin
contexts:
- name: admin
  context: {cluster: cluster, user: admin}
clusters:
- name: cluster
  cluster: {server: %q, certificate-authority: %q}
users:
- name: admin
  user: {client-certificate: %q, client-key: %q}
`, s.url(), k.authority, k.adminCertificate, k.adminKey)
	path := filepath.Join(s.dir, "kubeconfig")
	return path, os.WriteFile(path, []byte(text), 0o600)
}
