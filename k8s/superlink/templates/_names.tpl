{{/* What the release is called: names, labels, addresses and images. */}}

{{- define "superlink.fullname" -}}
{{- .Values.fullnameOverride | default .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Labels that never change, of a component: (list $ "superlink"). */}}
{{- define "superlink.selector" -}}
{{- $ := index . 0 -}}
app.kubernetes.io/name: vlafleet-superlink
app.kubernetes.io/instance: {{ $.Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* All labels of an object of a component: (list $ "superlink"). */}}
{{- define "superlink.labels" -}}
{{- $ := index . 0 -}}
helm.sh/chart: {{ printf "%s-%s" $.Chart.Name ($.Chart.Version | replace "+" "_") }}
app.kubernetes.io/managed-by: {{ $.Release.Service }}
{{ include "superlink.podLabels" . }}
{{- end -}}

{{/* All labels of a component's pods, which another version of the chart alone does not replace: (list $ "superlink"). */}}
{{- define "superlink.podLabels" -}}
{{- $ := index . 0 -}}
{{ include "superlink.selector" . }}
app.kubernetes.io/version: {{ $.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: vlafleet
{{- with $.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* An object's metadata of a component: (list $ "superlink"), or with another name (list $ "superlink" "monitor"). */}}
{{- define "superlink.metadata" -}}
{{- $ := index . 0 -}}
name: {{ include "superlink.fullname" $ }}-{{ last . }}
namespace: {{ $.Release.Namespace | quote }}
labels:
  {{- include "superlink.labels" (list $ (index . 1)) | nindent 2 }}
{{- end -}}

{{/* registry/repository with a tag or a digest: (list $ .Values.superlink.image). */}}
{{- define "superlink.image" -}}
{{- $ := index . 0 -}}
{{- $image := index . 1 -}}
{{- with $.Values.imageRegistry }}{{ trimSuffix "/" . }}/{{ end -}}
{{- $image.repository -}}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default $.Chart.AppVersion }}{{ end -}}
{{- end -}}

{{/* Where a server answers inside the cluster, for its own release: (list $ "enrolment"). */}}
{{- define "superlink.inside" -}}
{{- $ := index . 0 -}}
{{- $component := index . 1 -}}
{{- $port := dict "superlink" $.Values.superlink.service.port "enrolment" $.Values.enrolment.service.port -}}
{{- printf "%s-%s:%d" (include "superlink.fullname" $) $component (int (get $port $component)) -}}
{{- end -}}

{{/* Where sites reach a server: (list $ "enrolment"). By default the Service, from any namespace of this cluster. */}}
{{- define "superlink.address" -}}
{{- $ := index . 0 -}}
{{- $component := index . 1 -}}
{{- $given := index $.Values $component -}}
{{- if $given.address -}}
{{- $given.address -}}
{{- else -}}
{{- printf "%s-%s.%s.svc:%d" (include "superlink.fullname" $) $component $.Release.Namespace (int $given.service.port) -}}
{{- end -}}
{{- end -}}

{{/* The names and addresses that a server's certificate is good for, as JSON: (list $ "superlink"). */}}
{{- define "superlink.hosts" -}}
{{- $ := index . 0 -}}
{{- $service := printf "%s-%s" (include "superlink.fullname" $) (index . 1) -}}
{{- $inside := printf "%s.%s" $service $.Release.Namespace -}}
{{- $hosts := list "localhost" "127.0.0.1" $service $inside (printf "%s.svc" $inside) -}}
{{- if ne (index . 1) "exporter" -}}
{{- $address := include "superlink.address" . -}}
{{- $hosts = append $hosts (regexReplaceAll ":[0-9]+$" $address "" | trimPrefix "[" | trimSuffix "]") -}}
{{- end -}}
{{- $hosts | uniq | toJson -}}
{{- end -}}
