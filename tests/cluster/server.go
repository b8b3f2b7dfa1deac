package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"

	"github.com/spf13/pflag"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"
)

// serve runs the API server until the context ends.
func serve(ctx context.Context, s settings, keys *keys, etcd string) error {
	configuration := options.NewServerRunOptions()
	flags := pflag.NewFlagSet("kube-apiserver", pflag.ContinueOnError)
	for _, set := range configuration.Flags().FlagSets {
		flags.AddFlagSet(set)
	}
	arguments := []string{
		"--etcd-servers=" + etcd,
		// Only the tests compact.
		"--etcd-compaction-interval=0",
		"--bind-address=" + s.address,
		"--secure-port=" + strconv.Itoa(s.port),
		// There is nobody who could reach it through the Service "kubernetes".
		"--advertise-address=" + s.address,
		"--endpoint-reconciler-type=none",
		"--cert-dir=" + s.dir,
		"--tls-cert-file=" + keys.serverCertificate,
		"--tls-private-key-file=" + keys.serverKey,
		"--client-ca-file=" + keys.authority,
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + keys.accounts,
		"--service-account-signing-key-file=" + keys.accounts,
		"--service-cluster-ip-range=10.96.0.0/16",
		"--authorization-mode=RBAC",
		"--anonymous-auth=false",
		"--profiling=false",
	}
	if err := flags.Parse(append(arguments, s.flags...)); err != nil {
		return err
	}
	if err := configuration.GenericServerRunOptions.ComponentGlobalsRegistry.Set(); err != nil {
		return err
	}
	completed, err := configuration.Complete(ctx)
	if err != nil {
		return err
	}
	if errs := completed.Validate(); len(errs) != 0 {
		return utilerrors.NewAggregate(errs)
	}
	return app.Run(ctx, completed)
}

// awaitReady waits until the API server says that it is ready.
func awaitReady(ctx context.Context, s settings, keys *keys) error {
	admin, err := tls.LoadX509KeyPair(keys.adminCertificate, keys.adminKey)
	if err != nil {
		return err
	}
	authority, err := os.ReadFile(keys.authority)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(authority)
	client := http.Client{
		Timeout: 5 * time.Second,
		Transport: &http.Transport{
			TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{admin}},
		},
	}
	ctx, cancel := context.WithTimeout(ctx, starting)
	defer cancel()
	answer := "nobody listens"
	for {
		response, err := client.Get(s.url() + "/readyz")
		if err == nil {
			response.Body.Close()
			if response.StatusCode == http.StatusOK {
				return nil
			}
			answer = response.Status
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the API server is not ready after %s: %s", starting, answer)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (s settings) url() string {
	return "https://" + net.JoinHostPort(s.address, strconv.Itoa(s.port))
}
