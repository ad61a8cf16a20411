{{/* What no schema can say: values that do not fit together end the installation with a sentence. */}}

{{- define "superlink.validate" -}}
{{- include "superlink.validateNames" . -}}
{{- include "superlink.validateCertificates" . -}}
{{- include "superlink.validateHub" . -}}
{{- include "superlink.validateImage" (list "superlink.image" .Values.superlink.image) -}}
{{- include "superlink.validateImage" (list "superexec.image" .Values.superexec.image) -}}
{{- include "superlink.validateServer" (list "superlink" .Values.superlink) -}}
{{- include "superlink.validateServer" (list "enrolment" .Values.enrolment) -}}
{{- $networks := dict
  "networkPolicy.siteCidrs" .Values.networkPolicy.siteCidrs
  "networkPolicy.apiServer.cidrs" .Values.networkPolicy.apiServer.cidrs
  "networkPolicy.hubCidrs" .Values.networkPolicy.hubCidrs
  "superlink.service.loadBalancerSourceRanges" .Values.superlink.service.loadBalancerSourceRanges
  "enrolment.service.loadBalancerSourceRanges" .Values.enrolment.service.loadBalancerSourceRanges -}}
{{- range $value, $cidrs := $networks -}}
{{- range $cidrs -}}
{{- if not (regexMatch "^[0-9a-fA-F.:]+/[0-9]{1,3}$" .) -}}
{{- fail (printf "%s: %q is not a network; write an address and the length of its prefix, as in 203.0.113.0/24." $value .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "superlink.validateNames" -}}
{{- if not .Values.federation -}}
{{- fail "federation is missing: give the federation's name, as in --set federation=acme." -}}
{{- end -}}
{{- if not (regexMatch "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$" .Values.federation) -}}
{{- fail (printf "federation: %q is not allowed: use 1 to 63 lower-case letters, digits and dashes, beginning and ending with a letter or digit." .Values.federation) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([a-z0-9-]*[a-z0-9])?$" (include "superlink.fullname" .)) -}}
{{- fail (printf "the release's name %q cannot begin the names of Services, which consist of lower-case letters, digits and dashes and begin with a letter: install it under another name, or set fullnameOverride." (include "superlink.fullname" .)) -}}
{{- end -}}
{{- if not (regexMatch "^[1-9][0-9]{0,4}[smhd]$" .Values.enrolment.siteLifetime) -}}
{{- fail (printf "enrolment.siteLifetime: %q is not a duration: write a number and s, m, h or d, as in 7d." .Values.enrolment.siteLifetime) -}}
{{- end -}}
{{- end -}}

{{- define "superlink.validateImage" -}}
{{- $value := index . 0 -}}
{{- $image := index . 1 -}}
{{- if and $image.tag $image.digest -}}
{{- fail (printf "%s: tag %q and digest are both given: leave out one of them." $value $image.tag) -}}
{{- end -}}
{{- if eq $image.tag "latest" -}}
{{- fail (printf "%s.tag: \"latest\" is another image tomorrow: give a version, or a digest." $value) -}}
{{- end -}}
{{- if and $image.digest (not (regexMatch "^sha256:[0-9a-f]{64}$" $image.digest)) -}}
{{- fail (printf "%s.digest: %q is not a digest: write sha256: and 64 hexadecimal digits." $value $image.digest) -}}
{{- end -}}
{{- if regexMatch "[:@]" (base $image.repository) -}}
{{- fail (printf "%s.repository: %q ends with a tag or a digest: give it as %s.tag or %s.digest." $value $image.repository $value $value) -}}
{{- end -}}
{{- end -}}

{{- define "superlink.validateServer" -}}
{{- $component := index . 0 -}}
{{- $address := (index . 1).address -}}
{{- $service := (index . 1).service -}}
{{- if and $address (not (regexMatch "^(\\[[0-9a-fA-F:.]+\\]|[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?):[1-9][0-9]{0,4}$" $address)) -}}
{{- fail (printf "%s.address: %q is not host:port, as in %s.example.org:%d; no scheme, no path." $component $address $component (int $service.port)) -}}
{{- end -}}
{{- if and $service.nodePort (eq $service.type "ClusterIP") -}}
{{- fail (printf "%s.service.nodePort is %d, but a Service of the type ClusterIP has no port on the nodes: set type to NodePort or LoadBalancer, or leave nodePort out." $component (int $service.nodePort)) -}}
{{- end -}}
{{- if and $service.externalTrafficPolicy (eq $service.type "ClusterIP") -}}
{{- fail (printf "%s.service.externalTrafficPolicy is given, but a Service of the type ClusterIP has no traffic from outside: set type to NodePort or LoadBalancer, or leave it out." $component) -}}
{{- end -}}
{{- if and (or $service.loadBalancerClass $service.loadBalancerSourceRanges) (ne $service.type "LoadBalancer") -}}
{{- fail (printf "%s.service: loadBalancerClass and loadBalancerSourceRanges are for the type LoadBalancer, not %s: set type, or leave them out." $component $service.type) -}}
{{- end -}}
{{- end -}}

{{- define "superlink.validateCertificates" -}}
{{- $certificates := .Values.certificates -}}
{{- $given := compact (values $certificates.existingSecrets) -}}
{{- $list := $certificates.revocationList.existingSecret -}}
{{- $source := include "superlink.source" . -}}
{{- if and $given $certificates.issuerRef.name -}}
{{- fail "certificates: existingSecrets and issuerRef.name are both given: identities come from one of them, or from the federation's own authority if neither is given." -}}
{{- end -}}
{{- if and $given (lt (len $given) 3) -}}
{{- range $holder, $secret := $certificates.existingSecrets -}}
{{- if not $secret -}}
{{- fail (printf "certificates.existingSecrets.%s is missing: give the Secrets of superlink, superexec and exporter, or none of them." $holder) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if eq $source "authority" -}}
{{- if $list -}}
{{- fail "certificates.revocationList.existingSecret is given, but the federation's own authority signs its list itself: leave it out, or give existingSecrets or issuerRef.name." -}}
{{- end -}}
{{- else -}}
{{- if not $list -}}
{{- fail "certificates.revocationList.existingSecret is missing: SuperLink and exporter start with no certificates of others unless a signed list (crl.pem) tells which of them are revoked." -}}
{{- end -}}
{{- if .Values.enrolment.address -}}
{{- fail "enrolment.address is given, but without the federation's own authority there is no enrolment service: leave it out, or leave out certificates.existingSecrets and issuerRef.name." -}}
{{- end -}}
{{- end -}}
{{- if and .Values.serviceMonitor.enabled (eq $source "secrets") (not .Values.serviceMonitor.monitorSecret) -}}
{{- fail "serviceMonitor.monitorSecret is missing: with existing Secrets, give the one with the certificate that Prometheus presents (role monitor)." -}}
{{- end -}}
{{- end -}}

{{- define "superlink.validateHub" -}}
{{- $superexec := .Values.superexec -}}
{{- range $superexec.models -}}
{{- if not (regexMatch "^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$" .) -}}
{{- fail (printf "superexec.models: %q is not owner/name of a model on the Hugging Face Hub, as in lerobot/smolvla_base." .) -}}
{{- end -}}
{{- end -}}
{{- if and $superexec.hub.enabled (not $superexec.hub.existingSecret) -}}
{{- fail "superexec.hub.existingSecret is missing: to publish the model, the ServerApp needs the hub's token (key HF_TOKEN)." -}}
{{- end -}}
{{- if and $superexec.hub.existingSecret (not $superexec.hub.enabled) (not $superexec.models) -}}
{{- fail "superexec.hub.existingSecret is given, but nothing uses the hub: set superexec.hub.enabled, or superexec.models." -}}
{{- end -}}
{{- end -}}
