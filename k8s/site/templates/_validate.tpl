{{/* What a schema cannot say, or says in its own words: a sentence each, the first that is wrong. */}}
{{- define "site.validate" -}}
{{- $label := "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$" -}}
{{- $address := "^([A-Za-z0-9.-]{1,253}|\\[[0-9A-Fa-f:.]{2,45}\\]):([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])$" -}}
{{- $hubName := "^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$" -}}

{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" (include "site.fullname" .)) -}}
{{- fail (printf "the objects' names would begin with %q, which no Service's may: use lower-case letters, digits and dashes, a letter first, in the release's name or fullnameOverride" (include "site.fullname" .)) -}}
{{- end -}}

{{- range $field := list "site" "federation" -}}
{{- $name := get $.Values $field -}}
{{- if not $name -}}
{{- fail (printf "%s is empty: give the name that the invitation, or the certificate, says" $field) -}}
{{- end -}}
{{- if not (regexMatch $label $name) -}}
{{- fail (printf "%s is %q: a name has lower-case letters, digits and dashes, at most 63, as a DNS label" $field $name) -}}
{{- end -}}
{{- end -}}
{{- if eq .Values.site "superlink" -}}
{{- fail "site is \"superlink\", which is the SuperLink's own name: choose another one" -}}
{{- end -}}

{{- if not .Values.superlink -}}
{{- fail "superlink is empty: give the host:port where the federation's SuperLink answers" -}}
{{- end -}}
{{- range $field := list "superlink" "enrolment" -}}
{{- with get $.Values $field -}}
{{- if not (regexMatch $address .) -}}
{{- fail (printf "%s is %q, which is not host:port" $field .) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- with .Values.identity -}}
{{- if and .invitation.existingSecret (or .existingSecret .superexecSecret) -}}
{{- fail "identity has two sources: set either identity.invitation.existingSecret, or identity.existingSecret and identity.superexecSecret" -}}
{{- end -}}
{{- if not (or .invitation.existingSecret .existingSecret .superexecSecret) -}}
{{- fail "identity has no source: set identity.invitation.existingSecret to join by invitation, or identity.existingSecret and identity.superexecSecret where the site's certificates are there" -}}
{{- end -}}
{{- if and (not .invitation.existingSecret) (not (and .existingSecret .superexecSecret)) -}}
{{- fail "identity has half a source: identity.existingSecret is the SuperNode's Secret and identity.superexecSecret the SuperExec's, and a site needs both" -}}
{{- end -}}
{{- if and .invitation.existingSecret (not $.Values.enrolment) -}}
{{- fail "enrolment is empty: give the host:port where the federation enrols, which the invitation is taken to" -}}
{{- end -}}
{{- if and .existingSecret (eq .existingSecret .superexecSecret) -}}
{{- fail (printf "identity.existingSecret and identity.superexecSecret are both %q: the app must not see the SuperNode's keys" .existingSecret) -}}
{{- end -}}
{{- end -}}

{{- with .Values.dataset -}}
{{- $given := compact (list .existingClaim .hostPath .hub) -}}
{{- if not $given -}}
{{- fail "dataset is not set: give the recordings as dataset.existingClaim, dataset.hostPath or dataset.hub" -}}
{{- end -}}
{{- if gt (len $given) 1 -}}
{{- fail (printf "dataset is set %d times (%s): set one of dataset.existingClaim, dataset.hostPath and dataset.hub" (len $given) (join ", " $given)) -}}
{{- end -}}
{{- if and .subPath (not .existingClaim) -}}
{{- fail "dataset.subPath is a directory of dataset.existingClaim, which is not set" -}}
{{- end -}}
{{- if or (hasPrefix "/" .subPath) (has ".." (splitList "/" .subPath)) -}}
{{- fail (printf "dataset.subPath is %q: give it from the claim's root, without a leading slash and without \"..\"" .subPath) -}}
{{- end -}}
{{- if and .hostPath (or (not (hasPrefix "/" .hostPath)) (has ".." (splitList "/" .hostPath)) (not (clean .hostPath | trimPrefix "/"))) -}}
{{- fail (printf "dataset.hostPath is %q: give the recordings' directory on the node, as an absolute path without \"..\"" .hostPath) -}}
{{- end -}}
{{- if and .hub (not (regexMatch $hubName .hub)) -}}
{{- fail (printf "dataset.hub is %q, which is not owner/name" .hub) -}}
{{- end -}}
{{- if .episodes -}}
{{- if not (regexMatch "^[0-9]{1,9}:[0-9]{1,9}$" .episodes) -}}
{{- fail (printf "dataset.episodes is %q: give it as first:end, \"0:50\" for the first fifty" .episodes) -}}
{{- end -}}
{{- $ends := splitList ":" .episodes -}}
{{- if ge (index $ends 0 | atoi) (index $ends 1 | atoi) -}}
{{- fail (printf "dataset.episodes is %q, in which no episode is: the end has to be above the first" .episodes) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- range $component := list "supernode" "app" -}}
{{- $image := (get $.Values $component).image -}}
{{- if and $image.tag $image.digest -}}
{{- fail (printf "%s.image has a tag and a digest: set one of them" $component) -}}
{{- end -}}
{{- if eq $image.tag "latest" -}}
{{- fail (printf "%s.image.tag is \"latest\", which is another image tomorrow: name a version, or a digest" $component) -}}
{{- end -}}
{{- if and $image.tag (not (regexMatch "^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$" $image.tag)) -}}
{{- fail (printf "%s.image.tag is %q, which is not a tag; a digest goes into %s.image.digest" $component $image.tag $component) -}}
{{- end -}}
{{- if and $image.digest (not (regexMatch "^sha256:[0-9a-f]{64}$" $image.digest)) -}}
{{- fail (printf "%s.image.digest is %q, which is not sha256: and 64 hexadecimal digits" $component $image.digest) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z0-9]+([._/-]+[a-z0-9]+)*$" $image.repository) -}}
{{- fail (printf "%s.image.repository is %q: give the image's name below imageRegistry, without a tag" $component $image.repository) -}}
{{- end -}}
{{- end -}}

{{- with .Values.app -}}
{{- range .models -}}
{{- if not (regexMatch $hubName .) -}}
{{- fail (printf "app.models names %q, which is not owner/name" .) -}}
{{- end -}}
{{- end -}}
{{- if and .gpu.count (not (regexMatch "^[a-z0-9]([a-z0-9.-]*[a-z0-9])?/[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$" .gpu.resource)) -}}
{{- fail (printf "app.gpu.resource is %q: give the name that the device plugin registers, as nvidia.com/gpu" .gpu.resource) -}}
{{- end -}}
{{- if eq .executor.type "kubernetes" -}}
{{- if not .executor.namespace -}}
{{- fail "app.executor.namespace is empty: who may make pods in a namespace can read all of it, so the Kubernetes executor needs one without the SuperNode's keys" -}}
{{- end -}}
{{- if eq .executor.namespace $.Release.Namespace -}}
{{- fail (printf "app.executor.namespace is %q, the release's own: who may make pods in a namespace can read all of it, and this one holds the SuperNode's keys" .executor.namespace) -}}
{{- end -}}
{{- if not (regexMatch $label .executor.namespace) -}}
{{- fail (printf "app.executor.namespace is %q, which no namespace can be called" .executor.namespace) -}}
{{- end -}}
{{- else if .executor.namespace -}}
{{- fail "app.executor.namespace is set and app.executor.type is not \"kubernetes\": with \"subprocess\" the app runs beside the SuperNode" -}}
{{- end -}}
{{- end -}}

{{- if and .Values.hub.existingSecret (not (include "site.fetches" .)) -}}
{{- fail "hub.existingSecret is set and nothing is fetched: name what in dataset.hub or app.models" -}}
{{- end -}}
{{- if and .Values.metrics.podMonitor.enabled (not .Values.metrics.enabled) -}}
{{- fail "metrics.podMonitor.enabled needs metrics.enabled: the SuperNode shows nothing to scrape otherwise" -}}
{{- end -}}
{{- range $name, $value := .Values.commonLabels -}}
{{- if or (hasPrefix "app.kubernetes.io/" $name) (hasPrefix "helm.sh/" $name) (hasPrefix "vlafleet.dev/" $name) -}}
{{- fail (printf "commonLabels has %s, which the chart sets itself" $name) -}}
{{- end -}}
{{- end -}}
{{- end }}
