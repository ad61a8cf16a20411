{{/* What the process that trains gets, in the app's own pod or in a task's. Lists, which toYaml and fromYamlArray pass on. */}}

{{- define "site.trainingEnvironment" -}}
- {name: VLAFLEET_LOG_FORMAT, value: {{ .Values.logFormat }}}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- if .Values.app.models }}
- {name: HF_HUB_CACHE, value: /fetched/models}
{{- end }}
{{- if .Values.app.gpu.count }}
- {name: NVIDIA_DRIVER_CAPABILITIES, value: "compute,utility"}
{{- end }}
{{- end }}

{{/* With the GPUs, or the parts of one, among the limits: Kubernetes requests as many. */}}
{{- define "site.trainingResources" -}}
{{- $resources := deepCopy .Values.app.resources -}}
{{- with .Values.app.gpu -}}
{{- if .count -}}
{{- $_ := set $resources "limits" (merge (dict .resource .count) ($resources.limits | default dict)) -}}
{{- end -}}
{{- end -}}
{{ toYaml $resources }}
{{- end }}

{{- define "site.trainingMounts" -}}
# What training keeps between rounds: the last model, optimiser moments, error feedback.
- {name: data, mountPath: /var/lib/vlafleet/sites, subPath: sites}
# What the frozen VLM makes of the site's frames, where memory is too small for it.
- {name: cache, mountPath: /var/lib/vlafleet/cache}
{{- if .Values.dataset.hub }}
- {name: hub, mountPath: /data, subPath: {{ printf "datasets/%s" .Values.dataset.hub | quote }}, readOnly: true}
{{- else if .Values.dataset.subPath }}
- {name: dataset, mountPath: /data, subPath: {{ .Values.dataset.subPath | quote }}, readOnly: true}
{{- else }}
- {name: dataset, mountPath: /data, readOnly: true}
{{- end }}
{{- if .Values.app.models }}
- {name: hub, mountPath: /fetched/models, subPath: models, readOnly: true}
{{- end }}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /home/vlafleet}
{{- end }}

{{- define "site.trainingVolumes" -}}
- name: data
  persistentVolumeClaim:
    claimName: {{ include "site.claimName" (list . "state" .Values.app.persistence.state) | quote }}
- name: cache
  persistentVolumeClaim:
    claimName: {{ include "site.claimName" (list . "cache" .Values.app.persistence.cache) | quote }}
{{- with .Values.dataset.existingClaim }}
- name: dataset
  # Read-only as a volume, too: the recordings keep their owners and modes.
  persistentVolumeClaim:
    claimName: {{ . | quote }}
    readOnly: true
{{- end }}
{{- with .Values.dataset.hostPath }}
- name: dataset
  hostPath:
    path: {{ . | quote }}
    type: Directory
{{- end }}
{{- if include "site.fetches" . }}
- name: hub
  persistentVolumeClaim:
    claimName: {{ include "site.claimName" (list . "hub" .Values.app.persistence.hub) | quote }}
{{- end }}
{{ include "site.scratch" (list "512Mi" "2Gi") }}
{{- end }}

{{/* What the hub is asked for, as fetch.sh takes it. */}}
{{- define "site.fetchArguments" -}}
{{- $names := concat .Values.app.models (ternary (list "--" .Values.dataset.hub) list (not (empty .Values.dataset.hub))) -}}
{{ toYaml $names }}
{{- end }}

{{/* Holds the app's pod back until the fetch Job has put everything in place: mounted earlier it would be empty. */}}
{{- define "site.waitForHub" -}}
- name: fetched
  {{- include "site.container" (list . .Values.app.image) | nindent 2 }}
  command: [/bin/sh, /scripts/fetch.sh]
  args:
    - --wait
    {{- include "site.fetchArguments" . | nindent 4 }}
  resources:
    requests: {cpu: 10m, memory: 16Mi}
    limits: {memory: 64Mi, ephemeral-storage: 64Mi}
  volumeMounts:
    - {name: hub, mountPath: /fetched, readOnly: true}
    - {name: scripts, mountPath: /scripts, readOnly: true}
    - {name: tmp, mountPath: /tmp}
    - {name: home, mountPath: /home/vlafleet}
{{- end }}

{{- define "site.scriptsVolume" -}}
- name: scripts
  configMap:
    name: {{ include "site.fullname" . }}-fetch
{{- end }}

{{/* For pods that train: no DNS server is asked, since a resolver is a way out of the building. */}}
{{- define "site.noResolver" -}}
dnsPolicy: None
dnsConfig:
  nameservers: ["127.0.0.1"]
{{- end }}
